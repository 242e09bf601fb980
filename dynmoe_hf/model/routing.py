# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""The routing contract: what a router may look at, and what it answers.

Shapes used in every file of this folder: `T` tokens (= `B * S`), `E` experts, `K` slots (the most experts one token
may use), `D` hidden size, `I` expert width, `B` batch, `S` sequence.
"""

import contextlib
import difflib
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, distributed

MAX_WIDTH = 2**20  # of an FFN or a router
MAX_FACTOR = 1e6  # of a number that scales others: a few of them multiplied stay finite in float32


class Routing(NamedTuple):
    """Which experts every token uses in one layer, and how much each counts.

    A tuple rather than a dataclass, because a decoder layer returns its fields side by side: then every form of
    activation checkpointing sees plain tensors and carries the gradient of the router through them.
    """

    expert_ids: Tensor  # (T, K) int64, unique in a row; E in an unused slot
    weights: Tensor  # (T, K) in the hidden dtype; 0 in an unused slot
    logits: Tensor  # (T, E) float32, the raw scores
    probs: Tensor  # (T, E) float32, the scores as a distribution over the experts: rows sum to 1
    state: Tensor | None = None  # (T, N) what the scorer hands to the next MoE layer
    token_loss: Tensor | None = None  # (T,) float32, what the selector itself minimises; NaN where a token has none

    @classmethod
    def unflatten(cls, fields: Sequence[Tensor | None]) -> list["Routing"]:
        """The Routings whose fields stand one after the other."""
        size = len(cls._fields)
        return [cls(*fields[start : start + size]) for start in range(0, len(fields), size)]

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    @property
    def used(self) -> Tensor:
        """(T, K) bool: the slots that hold an expert."""
        return self.expert_ids < self.num_experts

    @property
    def num_selected(self) -> Tensor:
        """(T,) int64: experts used by each token."""
        return self.used.sum(-1)

    def selected(self) -> Tensor:
        """(T, E) float32: 1 where the token uses the expert."""
        num_tokens, num_experts = self.logits.shape
        dense = self.logits.new_zeros(num_tokens, num_experts + 1, dtype=torch.float32)
        return dense.scatter(1, self.expert_ids, 1.0)[:, :-1]

    def masked(self, token_mask: Tensor | None) -> "Routing":
        """The same routing in which tokens outside `token_mask` (T,) select nothing."""
        if token_mask is None:
            return self
        keep = token_mask[:, None]
        return self._replace(
            expert_ids=self.expert_ids.masked_fill(~keep, self.num_experts),
            weights=self.weights.masked_fill(~keep, 0.0),
            token_loss=None if self.token_loss is None else self.token_loss.masked_fill(~token_mask, torch.nan),
        )


class RoutingContext(NamedTuple):
    """What a scorer or a selector may look at beside its hidden states."""

    layer_idx: int
    token_mask: Tensor | None = None  # (T,) bool, False on padding; None when every token is real
    state: Tensor | None = None  # (T, N) float32, `Routing.state` of the router before; None in the first one
    shared: Callable[..., Any] | None = None  # what all routers with this scorer share, see `Scorer.Shared`
    expert_norms: Tensor | None = None  # (T, E) float32, norm of each expert's own activation, see `Scorer.reads_norms`
    importance: Tensor | None = None  # (T,) float32 statistic of the token's attention, see `Selector.statistic`
    hidden_states: Tensor | None = None  # (T, D) what the scorer has scored


def real_tokens(attention_mask: Tensor | None, batch_size: int, sequence_length: int) -> Tensor | None:
    """The tokens of this call that are not padding, (B, S) bool, or None when every token is real.

    A two-dimensional `attention_mask` (B, >= S) covers the cached tokens too, so its last S columns are read. Masks in
    any other form (4-D, or already prepared for a static cache) say nothing about padding.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -sequence_length:].to(torch.bool).expand(batch_size, -1)


def is_distributed() -> bool:
    """Whether there are other processes that this one can exchange numbers with."""
    return distributed.is_available() and distributed.is_initialized()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """A block of code in which autocast is off."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def shown(value: object) -> str:
    """A value as a message shows it, however long it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence for a name that nobody knows: what it is, the nearest known name, and all that is accepted."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Unknown {kind} {shown(name)}.{hint} Accepted: {', '.join(known) if known else 'none'}."


def build_options(options_class: type, values: Mapping[str, Any], where: str) -> Any:
    """Build the typed options of a part from a config's plain dict.

    Args:
        options_class: a dataclass decorated with `huggingface_hub.dataclasses.strict`, which checks the types.
        values: the keys of the part without its `type`.
        where: the field that a message should name, e.g. `routing.selector`.

    Raises:
        ValueError: on an unknown key, a value of the wrong type, or a value outside its range.
    """
    known = [field.name for field in fields(options_class)]
    for key in values:
        if key not in known:
            raise ValueError(unknown_name(f"key in {where}:", key, known))
    try:
        return options_class(**values)
    except (StrictDataclassError, ValueError) as error:
        reason = textwrap.shorten(str(error).strip().splitlines()[-1], 400, placeholder=" ...")
        raise ValueError(f"{where}: {reason}") from error
