# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Controllers: state that moves once per optimizer step, outside of every forward pass, and is saved with the model.

A training forward only counts what was routed, after the layers have run, so that activation checkpointing cannot count
twice. `model.update_controllers()` adds up the counts of all forward passes and processes since the last update, and
moves the state; the Trainer does it through `dynmoe_hf.training.callbacks.ControllerCallback`. Evaluation changes
nothing. Shapes: `L` controlled layers.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, distributed, nn
from transformers import initialization as init

from .buffers import KeepsBufferDtype
from .routing import is_distributed

MAX_GAIN = 1e6
CALLS_WITHOUT_UPDATE = 1000  # more than anyone accumulates


@strict
@dataclass
class NoOptions:
    """`none` has no options."""


@strict
@dataclass
class BudgetOptions:
    """Options of `budget`.

    Args:
        target: experts per token to hold, above 0, a mean over tokens and controlled layers. In a `cartesian` layer the
            experts are pairs, so a token uses k_A * k_B of E * E.
        gain_p: gain on the error, >= 0. The error is `(target - used) / E`.
        gain_i: gain on the sum of errors, >= 0.
        p_min, p_max: range of the threshold, 0 <= p_min <= p_max <= 1.
        scope: one `global` threshold, so that layers may use different numbers of experts, or one for each `layer`.
    """

    target: float | int = 2.0
    gain_p: float | int = 0.3
    gain_i: float | int = 0.3
    p_min: float | int = 0.01
    p_max: float | int = 1.0
    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        if not 0 < self.target <= 1e12:
            raise ValueError(f"target must be a finite number above 0 and at most 1e12, got {self.target}.")
        for name in ("gain_p", "gain_i"):
            if not 0 <= getattr(self, name) <= MAX_GAIN:
                raise ValueError(
                    f"{name} must be a finite number >= 0 and at most {MAX_GAIN:g}, got {getattr(self, name)}."
                )
        if not 0 <= self.p_min <= self.p_max <= 1:
            raise ValueError(f"p_min and p_max must be in order within 0 ... 1, got {self.p_min} and {self.p_max}.")


class BudgetController(KeepsBufferDtype):
    """Moves the threshold of `top_p` so that tokens use `target` experts in the mean.

    A proportional-integral loop in positional form (DTop-p, Jin et al. 2025, arXiv 2512.13996): after step t, with
    `e_t = (target - used_t) / E` and `S_t = S_(t-1) + e_t`, the threshold is `p_0 + gain_p e_t + gain_i S_t`, within
    p_min ... p_max. While a bound holds the threshold, S does not grow towards it.

    Args:
        options: see BudgetOptions.
        num_experts: E of each controlled layer, the number of pairs in a cartesian one.
        initial: p_0 of each controlled layer.
    """

    Options = BudgetOptions

    def __init__(self, options: BudgetOptions, num_experts: list[int], initial: list[float]) -> None:
        super().__init__()
        self.options = options
        self.num_experts = num_experts
        self.initial = initial
        self.integral = nn.Buffer(torch.zeros((len(initial),) if options.scope == "layer" else (), dtype=torch.float32))
        # Counts since the last update: experts used in each layer, then tokens. No buffer, because data-parallel
        # training would overwrite it with the one of the first process.
        self.counts: Tensor | None
        self.forget()

    @torch.no_grad()
    def count(self, used: list[Tensor], num_tokens: Tensor | int) -> None:
        """Add one training forward: experts that all its tokens used in each layer, scalars, and its real tokens."""
        device = used[0].device
        parts = [torch.as_tensor(part, device=device).to(device, torch.float32) for part in (*used, num_tokens)]
        counts = torch.stack(parts).to(_count_dtype(device))
        self.counts = counts if self.counts is None else self.counts.to(device) + counts
        if torch.compiler.is_compiling():
            return  # a compiled forward would be compiled again for every number of calls
        self.num_calls += 1
        if self.num_calls == CALLS_WITHOUT_UPDATE:
            warnings.warn(
                f"{self.num_calls} training steps without an update of the controller: its threshold does not move. "
                "Call model.update_controllers() after each optimizer step, or give the Trainer a ControllerCallback.",
                stacklevel=2,
            )

    @torch.no_grad()
    def close_step(self) -> list[float] | None:
        """Close one optimizer step.

        Under `torch.distributed` every process must call it.

        Returns:
            The new threshold of each controlled layer, or None if no real token has been counted.
        """
        counts = self.counts
        if counts is None:
            device = self.integral.device
            counts = torch.zeros(len(self.initial) + 1, dtype=_count_dtype(device), device=device)
        self.forget()
        if is_distributed():
            distributed.all_reduce(counts)
        *used, num_tokens = counts.tolist()
        return None if num_tokens == 0 else self.step([number / num_tokens for number in used])

    def forget(self) -> None:
        """Drop what has been counted, as after a step that was never completed."""
        self.counts, self.num_calls = None, 0

    def step(self, used: list[float]) -> list[float]:
        """One step of the loop, from the mean experts of each layer to its threshold."""
        options = self.options
        errors = [(options.target - mean) / number for mean, number in zip(used, self.num_experts, strict=True)]
        if options.scope == "global":
            errors = [sum(errors) / len(errors)]
        integrals = self.integral.flatten().tolist()
        wanted = []
        for index, (error, integral) in enumerate(zip(errors, integrals, strict=True)):
            moved = options.gain_p * error + options.gain_i * (integral + error)
            starts = self.initial if options.scope == "global" else [self.initial[index]]
            held_up, held_down = min(starts) + moved > options.p_max, max(starts) + moved < options.p_min
            outward = (held_up and error > 0) or (held_down and error < 0)
            integrals[index] = integral if outward else integral + error
            wanted.append(moved)
        self.integral.copy_(torch.tensor(integrals).view_as(self.integral))
        if options.scope == "global":
            wanted *= len(self.initial)
        return [
            min(max(start + moved, options.p_min), options.p_max)
            for start, moved in zip(self.initial, wanted, strict=True)
        ]

    def init_weights(self, std: float) -> None:
        """Fill the buffer."""
        init.zeros_(self.integral)


def _count_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


@functools.cache
def gaussian_threshold(num_experts: int, target: float) -> float:
    """The threshold at which standardised Gaussian logits use `target` of `num_experts` experts in the mean.

    By simulation, to about 0.01. It is a good start for a controller: logits of an untrained router are Gaussian.
    """
    with torch.device("cpu"):  # a model may be being built on the meta device, which has no values
        generator = torch.Generator().manual_seed(0)
        num_tokens = max(min(20_000, 2**23 // num_experts), 1)  # fewer where there are many experts
        logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float32)
        logits = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
        mass = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)[:, :-1].flatten().sort().values
    # A token uses one expert, and one more for every partial sum that does not exceed the threshold.
    rank = round((target - 1) * logits.shape[0])
    return mass[min(max(rank, 0), mass.numel() - 1)].item()


CONTROLLERS: dict[str, Any] = {"none": NoOptions, "budget": BudgetController}
