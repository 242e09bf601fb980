"""The sizes of expert layers that are measured, and inputs for them. Shapes as in model/routing.py; P used pairs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynmoe_hf.model.routing import Routing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A layer of SwiGLU experts and its tokens.

    Args:
        name: as in the tables.
        num_tokens: T.
        hidden_size: D.
        width: I, of one expert.
        num_experts: E.
        num_slots: K, the most experts of one token.
        mean_experts: of a token; None for K of each.
    """

    name: str
    num_tokens: int
    hidden_size: int
    width: int
    num_experts: int
    num_slots: int
    mean_experts: float | None = None

    @property
    def num_pairs(self) -> int:
        """P, exact: `draw_routing` gives out so many."""
        return round(self.num_tokens * (self.mean_experts or self.num_slots))

    @property
    def expert_parameters(self) -> int:
        return 3 * self.hidden_size * self.width

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"num_pairs": self.num_pairs}


FULL = {"a": Shape("a", 2048, 512, 1024, 16, 2), "b": Shape("b", 4096, 1024, 512, 64, 8)}
QUICK = {"a": Shape("a", 50, 32, 48, 4, 2), "b": Shape("b", 30, 48, 32, 8, 3)}


def shapes(quick: bool) -> dict[str, Shape]:
    """The layers a and b, or tiny ones of the same names."""
    return QUICK if quick else FULL


def variable(shape: Shape, num_slots: int, mean_experts: float) -> Shape:
    """The same layer for a number of experts that differs between tokens."""
    return replace(shape, num_slots=num_slots, mean_experts=mean_experts)


def draw_routing(shape: Shape, dtype: torch.dtype, seed: int) -> Routing:
    """A random choice of experts, 1 ... K for each token and `shape.num_pairs` in all, with weights that sum to 1."""
    num_tokens, num_slots, num_experts = shape.num_tokens, shape.num_slots, shape.num_experts
    generator = torch.Generator().manual_seed(seed)
    further = torch.zeros(num_tokens * (num_slots - 1), dtype=torch.long)
    further[torch.randperm(further.numel(), generator=generator)[: shape.num_pairs - num_tokens]] = 1
    counts = 1 + further.view(num_tokens, num_slots - 1).sum(-1, keepdim=True)  # (T, 1)
    unused = torch.arange(num_slots) >= counts  # (T, K)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    ids = logits.argsort(-1, descending=True)[:, :num_slots]
    weights = logits.gather(-1, ids).masked_fill(unused, -torch.inf).softmax(-1)
    return Routing(ids.masked_fill(unused, num_experts), weights.to(dtype), logits, logits.softmax(-1))


class Weights(NamedTuple):
    """Fused SwiGLU weights, as in transformers."""

    gate_up: Tensor  # (E, 2I, D)
    down: Tensor  # (E, D, I)

    @staticmethod
    def draw(shape: Shape, dtype: torch.dtype, seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        experts, width, hidden_size = shape.num_experts, shape.width, shape.hidden_size
        gate_up = torch.randn(experts, 2 * width, hidden_size, generator=generator).mul_(hidden_size**-0.5)
        down = torch.randn(experts, hidden_size, width, generator=generator).mul_(width**-0.5)
        return Weights(gate_up.to(dtype), down.to(dtype))

    def to(self, dtype: torch.dtype) -> Weights:
        return Weights(*(weight.to(dtype) for weight in self))


@dataclass(frozen=True)
class Problem:
    """What an entrant computes: the experts' weights, (T, D) inputs, their Routing, the gradient of the output."""

    shape: Shape
    weights: Weights
    hidden_states: Tensor
    routing: Routing
    grad_output: Tensor

    @staticmethod
    def draw(shape: Shape, dtype: torch.dtype, seed: int) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        hidden_states, grad_output = torch.randn(2, shape.num_tokens, shape.hidden_size, generator=generator).to(dtype)
        routing = draw_routing(shape, dtype, seed + 1)
        return Problem(shape, Weights.draw(shape, dtype, seed + 2), hidden_states, routing, grad_output)

    def first(self, num_tokens: int) -> Problem:
        """The same problem for the first tokens."""
        routing = Routing(*(None if field is None else field[:num_tokens] for field in self.routing))
        return replace(
            self,
            hidden_states=self.hidden_states[:num_tokens],
            routing=routing,
            grad_output=self.grad_output[:num_tokens],
        )

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            weights=self.weights.to(dtype),
            hidden_states=self.hidden_states.to(dtype),
            routing=self.routing._replace(weights=self.routing.weights.to(dtype)),
            grad_output=self.grad_output.to(dtype),
        )
