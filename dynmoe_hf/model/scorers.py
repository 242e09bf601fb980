# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Scorers: how well does expert e suit token t? One class a scorer; shapes as in routing.py."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .routing import RoutingContext


class Scores(NamedTuple):
    """The answer of a scorer."""

    logits: Tensor  # (T, E) float32
    state: Tensor | None = None  # (T, N) for the next MoE layer


class Scorer(nn.Module):
    """Base of all scorers. It stands at `mlp.gate` of its layer.

    A subclass names its typed options in `Options`, computes in float32 whatever the model's dtype, and looks at one
    token at a time, so that routing is causal and does not depend on the batch.
    """

    Options: type

    def __init__(self, options: Any, config: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        """Score the normalised input of the FFN block, (T, D) in any float dtype."""
        raise NotImplementedError

    def init_weights(self, std: float) -> None:
        """Fill every parameter and buffer, with functions of `transformers.initialization`."""
        raise NotImplementedError


@strict
@dataclass
class LinearOptions:
    """`linear` has no options."""


class LinearScorer(Scorer):
    """`logits = x W^T` with `W` (E, D) and no bias, in float32 (Shazeer et al. 2017, arXiv 1701.06538, section 2.1)."""

    Options = LinearOptions

    def __init__(self, options: LinearOptions, config: Any) -> None:
        super().__init__(options, config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        return Scores(F.linear(hidden_states.float(), self.weight.float()))

    def init_weights(self, std: float) -> None:
        init.normal_(self.weight, mean=0.0, std=std)


SCORERS: dict[str, type[Scorer]] = {"linear": LinearScorer}
