# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""How a Routing reaches the experts: the two forms of a call, and our own engines.

An engine is a function `(experts, hidden_states, expert_ids, weights) -> output` in transformers' experts interface;
`experts_implementation` of a model chooses one by name. Engines of transformers take no unused slots, so they never see
one:

* flat: the used (token, expert, weight) pairs, as a top-1 call on `P = sum of k_t` rows. Cost follows the experts used.
* padded: every token keeps its K slots and an unused one becomes expert 0 with weight 0. Shapes are static, as
  compilation needs them; the products of unused slots are paid for.

Both give the same result.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import ExpertsInterface
from .routing import Routing


def run_experts(experts: nn.Module, hidden_states: Tensor, routing: Routing, fills_every_slot: bool) -> Tensor:
    """Weighted sum of the experts that every token uses, in the form that suits the moment.

    Args:
        experts: a layout module, called as `experts(hidden_states, expert_ids, weights)`.
        hidden_states: (T, D).
        routing: weights in the dtype of `hidden_states`.
        fills_every_slot: no slot is unused, so the padded form wastes nothing.

    Returns:
        (T, D). Every expert parameter and every routing weight takes part in the graph, even if no pair is used.
    """
    if fills_every_slot or torch.compiler.is_compiling():
        if hidden_states.shape[0] > 0:
            return run_padded(experts, hidden_states, routing)
    return run_flat(experts, hidden_states, routing)


def run_padded(experts: nn.Module, hidden_states: Tensor, routing: Routing) -> Tensor:
    """One call with (T, K) slots; unused ones are expert 0 with weight 0."""
    return experts(hidden_states, routing.expert_ids.masked_fill(~routing.used, 0), routing.weights)


def run_flat(experts: nn.Module, hidden_states: Tensor, routing: Routing) -> Tensor:
    """One call with (P, 1) slots, P = number of used pairs."""
    token, slot = routing.used.nonzero(as_tuple=True)  # (P,), ordered by token
    output = torch.zeros_like(hidden_states)
    if token.numel() == 0:
        # An engine's answer to an empty call may be cut off from the graph; a parameter without a gradient makes
        # data-parallel training hang.
        row = hidden_states.new_zeros(1, hidden_states.shape[-1])
        idle = experts(row, token.new_zeros(1, 1), row.new_zeros(1, 1))
        return output + 0.0 * (idle.sum() + routing.weights.sum())
    expert_ids = routing.expert_ids[token, slot][:, None]
    weights = routing.weights[token, slot][:, None]
    return output.index_add(0, token, experts(hidden_states[token], expert_ids, weights))


def reference_experts(experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, weighted by what the routing gives it: slow, and plain to see that it is right."""
    output = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        weight = (weights * (expert_ids == expert)).sum(-1, keepdim=True)  # (T, 1)
        gate, up = F.linear(hidden_states, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        expert_output = F.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
        output = output + weight * expert_output
    return output


def ragged_experts(experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Pairs sorted by expert once, one product per used expert and projection, and one autograd node for the layer."""
    num_slots = expert_ids.shape[-1]
    order = expert_ids.reshape(-1).argsort(stable=True)  # (P,) pairs by expert
    counts = expert_ids.reshape(-1).bincount(minlength=experts.num_experts).tolist()[: experts.num_experts]
    order = order[: sum(counts)]  # expert parallelism gives the experts of other processes the id E
    gate_up_proj, down_proj = experts.gate_up_proj, experts.down_proj
    dtype = hidden_states.dtype
    if torch.is_autocast_enabled(hidden_states.device.type):
        compute_dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, gate_up_proj, down_proj = (
            tensor.to(compute_dtype) for tensor in (hidden_states, gate_up_proj, down_proj)
        )
    rows = order // num_slots  # (P,) token of each pair
    pair_output = _RaggedSwiglu.apply(hidden_states[rows], gate_up_proj, down_proj, counts, experts.act_fn)
    weighted = pair_output * weights.reshape(-1)[order][:, None]
    return torch.zeros_like(hidden_states, dtype=weighted.dtype).index_add(0, rows, weighted).to(dtype)


class _RaggedSwiglu(torch.autograd.Function):
    """`down(act(gate x) * up x)` on rows sorted by expert.

    Indexing `weight[e]` under autograd would allocate a gradient of the whole (E, ...) tensor for every expert; here
    each expert's gradient is written into its slice of one.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gate_up_proj: Tensor, down_proj: Tensor, counts: list[int], act: Any) -> Tensor:
        gate_up = rows.new_empty(rows.shape[0], gate_up_proj.shape[1])  # (P, 2I)
        for expert, part in _slices(counts):
            torch.mm(rows[part], gate_up_proj[expert].t(), out=gate_up[part])
        hidden = _gated(gate_up, act)  # (P, I)
        output = rows.new_empty(rows.shape[0], down_proj.shape[1])
        for expert, part in _slices(counts):
            torch.mm(hidden[part], down_proj[expert].t(), out=output[part])
        ctx.save_for_backward(rows, gate_up_proj, down_proj, gate_up)
        ctx.counts, ctx.act = counts, act
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The engine 'ragged' has no second derivatives: use experts_implementation='eager'.")
        rows, gate_up_proj, down_proj, gate_up = ctx.saved_tensors
        with torch.enable_grad():
            gate_up = gate_up.detach().requires_grad_()
            hidden = _gated(gate_up, ctx.act)
        grad_hidden = torch.empty_like(hidden)
        grad_down = torch.zeros_like(down_proj)
        for expert, part in _slices(ctx.counts):
            torch.mm(grad_output[part], down_proj[expert], out=grad_hidden[part])
            torch.mm(grad_output[part].t(), hidden.detach()[part], out=grad_down[expert])
        (grad_gate_up,) = torch.autograd.grad(hidden, gate_up, grad_hidden)
        grad_rows = torch.empty_like(rows)
        grad_in = torch.zeros_like(gate_up_proj)
        for expert, part in _slices(ctx.counts):
            torch.mm(grad_gate_up[part], gate_up_proj[expert], out=grad_rows[part])
            torch.mm(grad_gate_up[part].t(), rows[part], out=grad_in[expert])
        return grad_rows, grad_in, grad_down, None, None


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any."""
    start, slices = 0, []
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices


def _gated(gate_up: Tensor, act: Any) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return act(gate) * up


ENGINES = {"reference": reference_experts, "ragged": ragged_experts}
for _name, _engine in ENGINES.items():
    ExpertsInterface.register(_name, _engine)
