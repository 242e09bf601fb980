"""The ways to compute a layer of SwiGLU experts: our engines, those of transformers, and loops over modules.

All of them work on the same memory of weights; each has parameters, and so gradients, of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.dispatch import ENGINES, run_experts, run_flat, run_padded
from dynmoe_hf.model.modeling_dynmoe import DynMoeExperts
from dynmoe_hf.model.routing import Routing

from .shapes import Shape, Weights

REFERENCE = "reference"
TRANSFORMERS_ENGINES = ("grouped_mm", "batched_mm")
INDEXING = ("eager", "transformers_eager")  # loops over the fused weights, indexed under autograd
COPY_LIMIT = 4 * 2**30  # bytes of weights, or of zeros in the shape of all weights, that an entrant may allocate


class Experts:
    """Experts of an entrant, ready to be called with (T, D) and a Routing."""

    def __init__(self, module: nn.Module, call: Callable[[Tensor, Routing], Tensor]) -> None:
        self.module = module
        self.call = call

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the fused weights, 0 where there are none."""
        if isinstance(self.module, ExpertModules):
            gate_up = [torch.cat([_grad(expert.gate_proj), _grad(expert.up_proj)]) for expert in self.module.experts]
            down = [_grad(expert.down_proj) for expert in self.module.experts]
            return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack(down)}
        return {name: parameter.grad for name, parameter in self.module.named_parameters()}


def _grad(linear: nn.Linear) -> Tensor:
    return torch.zeros_like(linear.weight) if linear.weight.grad is None else linear.weight.grad


Builder = Callable[[Weights], Experts]


def own_engines() -> list[str]:
    """Names of our engines that are worth measuring."""
    return [name for name in ENGINES if name != REFERENCE]


# How a Routing becomes a call of the experts. `fixed` and `varying` are the two ways of a model of this package,
# `padded` is what a user of transformers has to do, and `flat` the pairs for an engine that takes no unused slots.
FORMS: dict[str, Callable[[nn.Module, Tensor, Routing, str], Tensor]] = {
    "fixed": partial(run_experts, fills_every_slot=True),
    "varying": partial(run_experts, fills_every_slot=False),
    "padded": lambda experts, hidden_states, routing, engine: run_padded(experts, hidden_states, routing),
    "flat": lambda experts, hidden_states, routing, engine: run_flat(experts, hidden_states, routing),
}


def build_engine(engine: str, form: str, weights: Weights) -> Experts:
    """Our experts module under any name that `experts_implementation` knows, called in one of `FORMS`."""
    num_experts, hidden_size, width = weights.down.shape
    config = DynMoeConfig(
        hidden_size=hidden_size,
        num_attention_heads=1,
        moe_intermediate_size=width,
        num_experts=num_experts,
        experts_implementation=engine,
    )
    with torch.device("meta"):
        experts = DynMoeExperts(config)
    _set_weights(experts, weights)
    return Experts(experts, partial(FORMS[form], experts, engine=engine))


def build_transformers_eager(weights: Weights) -> Experts:
    """Mixtral's experts with the forward pass of their own class, a loop that indexes the fused weights."""
    num_experts, hidden_size, width = weights.down.shape
    config = MixtralConfig(hidden_size=hidden_size, intermediate_size=width, num_local_experts=num_experts)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    _set_weights(experts, weights)
    return Experts(experts, lambda hidden_states, routing: experts(hidden_states, *padded(routing)))


def _set_weights(experts: nn.Module, weights: Weights) -> None:
    experts.gate_up_proj, experts.down_proj = nn.Parameter(weights.gate_up), nn.Parameter(weights.down)


def padded(routing: Routing) -> tuple[Tensor, Tensor]:
    """Expert ids and weights (T, K) for experts that know no unused slots: expert 0 with weight 0."""
    return routing.expert_ids.masked_fill(~routing.used, 0), routing.weights


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)` of three Linear modules."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear


class ExpertModules(nn.Module):
    """One module an expert."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        pairs = zip(weights.gate_up, weights.down, strict=True)
        self.experts = nn.ModuleList(SwiGLU(*gate_up.chunk(2), down) for gate_up, down in pairs)


class ModuleLoop(ExpertModules):
    """The loop of transformers' Mixtral before version 5."""

    def forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        expert_mask = F.one_hot(expert_ids, num_classes=len(self.experts) + 1).permute(2, 1, 0)  # (E + 1, K, T)
        for expert in expert_mask[:-1].sum((1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(expert_mask[expert])
            weighted = self.experts[expert](hidden_states[token]) * weights[token, slot, None]
            output.index_add_(0, token, weighted.to(hidden_states.dtype))
        return output


class OfficialLoop(ExpertModules):
    """The loop in the style of the code that Huang et al. released (arXiv 2403.07652): every expert, used or not."""

    def forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(expert_ids == number)
            weighted = expert(hidden_states[token]) * weights[token, slot].unsqueeze(1)
            output = output.index_add(0, token, weighted)
        return output


def build_loop(loop: type[ExpertModules], weights: Weights) -> Experts:
    """A loop over modules; it skips unused slots by itself."""
    module = loop(weights)
    return Experts(module, lambda hidden_states, routing: module(hidden_states, routing.expert_ids, routing.weights))


def build_dense(shape: Shape, dtype: torch.dtype, seed: int) -> SwiGLU:
    """One FFN as wide as the experts that a token uses in the mean."""
    width = round(shape.width * shape.num_pairs / shape.num_tokens / 8) * 8
    one = Shape("dense", 1, shape.hidden_size, width, 1, 1)
    weights = Weights.draw(one, dtype, seed)
    return SwiGLU(*weights.gate_up[0].chunk(2), weights.down[0])


def entrants_of(shape: Shape, dtype: torch.dtype, trains: bool = True) -> tuple[dict[str, Builder], dict[str, str]]:
    """Every way to compute the layer, by name; and those that are left out, each with the reason.

    Where the number of experts differs between tokens, engines of transformers enter twice: `_padded` as they must be
    called by a user of transformers, `_flat` as this package calls them.

    Args:
        shape: of the layer.
        dtype: of its weights.
        trains: gradients are computed, too.
    """
    own = "fixed" if shape.mean_experts is None else "varying"
    builders: dict[str, Builder] = {engine: partial(build_engine, engine, own) for engine in own_engines()}
    for engine in TRANSFORMERS_ENGINES:
        if shape.mean_experts is None:
            builders[engine] = partial(build_engine, engine, "fixed")
        else:
            builders |= {f"{engine}_{form}": partial(build_engine, engine, form) for form in ("padded", "flat")}
    builders["transformers_eager"] = build_transformers_eager
    builders["module_loop"] = partial(build_loop, ModuleLoop)
    builders["official_loop"] = partial(build_loop, OfficialLoop)
    left_out: dict[str, str] = {}
    for name in list(builders):
        allocated = _wasted_bytes(name, shape, dtype, trains)
        if allocated > COPY_LIMIT:
            del builders[name]
            what = "gradients of zeros" if name in INDEXING else "copies of weights"
            left_out[name] = f"would allocate {allocated / 2**30:.0f} GiB for {what}"
    return builders, left_out


def _wasted_bytes(name: str, shape: Shape, dtype: torch.dtype, trains: bool) -> int:
    """Bytes that an entrant allocates in proportion to the weights, beyond one gradient."""
    expert_bytes = shape.expert_parameters * dtype.itemsize
    if name.startswith("batched_mm"):
        is_flat = shape.mean_experts is None or name.endswith("_flat")
        return expert_bytes * (shape.num_pairs if is_flat else shape.num_tokens * shape.num_slots)
    if name in INDEXING and trains:
        return expert_bytes * shape.num_experts**2
    return 0
