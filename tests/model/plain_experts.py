"""Experts as their definition has them, in float64, and random calls of experts to compare with it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynmoe_hf.model.dispatch import run_experts
from dynmoe_hf.model.expert_layouts import LowRankOptions
from dynmoe_hf.model.low_rank_experts import LowRankExperts
from dynmoe_hf.model.modeling_dynmoe import DynMoeExperts
from dynmoe_hf.model.routing import Routing
from tests.tiny import tiny_config

LAYOUTS = ("swiglu", "low_rank")
ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


class Call(NamedTuple):
    """An experts module and what it is called with: (T, D), ids (T, K) with E in unused slots, weights (T, K)."""

    experts: nn.Module
    hidden_states: Tensor
    expert_ids: Tensor
    weights: Tensor

    def leaves(self) -> dict[str, Tensor]:
        inputs = {"hidden_states": self.hidden_states, "weights": self.weights}
        return inputs | {name: value for name, value in self.experts.named_parameters() if value.requires_grad}

    def probe(self) -> Tensor:
        return torch.randn(self.hidden_states.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def make_experts(
    layout: str,
    num_experts: int,
    engine: str = "ragged",
    hidden_size: int = 16,
    width: int = 24,
    rank: int = 8,
    std: float = 0.3,
    **changes: Any,
) -> nn.Module:
    """Seeded experts of a layout."""
    config = tiny_config(
        num_experts=num_experts,
        num_experts_per_tok=1,
        hidden_size=hidden_size,
        moe_intermediate_size=width,
        experts_implementation=engine,
        **changes,
    )
    low_rank = layout == "low_rank"
    experts = LowRankExperts(LowRankOptions(rank=rank), config) if low_rank else DynMoeExperts(config)
    generator = torch.Generator().manual_seed(7)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return experts


def make_call(experts: nn.Module, expert_ids: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    """Unused slots have a weight like all others: no engine may look at it."""
    experts = experts.to(dtype)
    generator = torch.Generator().manual_seed(2)
    hidden_size = experts.down_proj.shape[1]
    hidden_states = torch.randn(expert_ids.shape[0], hidden_size, generator=generator).to(dtype)
    weights = (0.1 + torch.rand(expert_ids.shape, generator=generator)).to(dtype)
    return Call(experts, hidden_states.requires_grad_(), expert_ids, weights.requires_grad_())


def strided(call: Call) -> Call:
    """The same numbers, nothing of them contiguous."""

    def every_second(tensor: Tensor) -> Tensor:
        wide = tensor.detach().repeat_interleave(2, dim=-1)[..., ::2]
        return wide.requires_grad_(tensor.requires_grad)

    for name, value in list(call.experts.named_parameters()):
        setattr(call.experts, name, nn.Parameter(every_second(value).detach()))
    transposed = call.hidden_states.detach().t().contiguous().t().requires_grad_()
    return Call(call.experts, transposed, every_second(call.expert_ids), every_second(call.weights))


def random_ids(num_tokens: int, num_experts: int, share: float, seed: int = 0) -> Tensor:
    """(T, E) ids in any order, of which this share is used, and unused slots anywhere."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_tokens, num_experts, generator=generator).argsort(-1)
    return order.masked_fill(torch.rand(order.shape, generator=generator) >= share, num_experts)


def differentiate(output: Tensor, probe: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`output` and the gradient of every leaf, zeros for one that takes no part."""
    grads: Iterable[Tensor | None] = [None] * len(leaves)
    if output.requires_grad:
        grads = torch.autograd.grad((output * probe.to(output.dtype)).sum(), list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return {"output": output.detach()} | {
        name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs
    }


def direct(call: Call, **options: Any) -> dict[str, Tensor]:
    """The engine gets the slots as they are."""
    output = call.experts(call.hidden_states, call.expert_ids, call.weights, **options)
    return differentiate(output, call.probe(), call.leaves())


def dispatched(call: Call, ranked: bool = False) -> dict[str, Tensor]:
    """As a block calls its experts; `ranked` by their own activations."""
    logits = call.hidden_states.new_zeros(call.hidden_states.shape[0], call.experts.num_experts)
    routing = Routing(call.expert_ids, call.weights, logits, logits)
    activations = call.experts.project(call.hidden_states)[1] if ranked else None
    engine = call.experts.config._experts_implementation
    output = run_experts(call.experts, call.hidden_states, routing, engine, False, activations)
    return differentiate(output, call.probe(), call.leaves())


def one_expert(weights: Mapping[str, Tensor], expert: int, rows: Tensor, activation: str) -> Tensor:
    """The FFN of one expert as autograd sees it, in the dtype of its weights."""
    act = ACTIVATIONS[activation]
    own = {name: weight[expert] for name, weight in weights.items()}
    if "up_proj" in own:
        gate = rows @ own["gate_down_proj"].T @ own["gate_up_proj_lowrank"].T
        up = rows @ own["up_proj"].T
    else:
        gate, up = (rows @ own["gate_up_proj"].T).chunk(2, dim=-1)
    return (act(gate) * up) @ own["down_proj"].T


def exact(call: Call, activation: str = "silu") -> dict[str, Tensor]:
    """Every expert on every token in float64, weighted by what the slots say."""
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in call.leaves().items()}
    tokens, slots = leaves["hidden_states"], leaves["weights"]
    parameters = dict(call.experts.named_parameters())
    weights = {name: leaves.get(name, value.detach().double()) for name, value in parameters.items()}
    output = torch.zeros_like(tokens)
    for expert in range(call.experts.num_experts):
        share = (slots * (call.expert_ids == expert)).sum(-1, keepdim=True)
        output = output + share * one_expert(weights, expert, tokens, activation)
    return differentiate(output, call.probe(), leaves)


def one_module_per_expert(call: Call) -> dict[str, Tensor]:
    """What most models do: one expert after the other on its rows, everything in the dtype of the model."""
    output = torch.zeros_like(call.hidden_states)
    for expert in range(call.experts.num_experts):
        token, slot = (call.expert_ids == expert).nonzero(as_tuple=True)
        rows = one_expert(dict(call.experts.named_parameters()), expert, call.hidden_states[token], "silu")
        output = output.index_add(0, token, rows * call.weights[token, slot, None])
    return differentiate(output, call.probe(), call.leaves())


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    """Relative to the largest element: sums cancel."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        close = {"rtol": 0, "atol": tolerance * max(largest, 1e-3)}
        torch.testing.assert_close({name: found[name].double()}, {name: value.double()}, **close)


def errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative distance of each tensor, by the Frobenius norm."""
    return {name: ((found[name].double() - value).norm() / value.norm()).item() for name, value in expected.items()}
