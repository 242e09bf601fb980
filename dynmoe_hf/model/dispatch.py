# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""How a Routing reaches the experts: the two forms of a call, and our own engines.

An engine is a function `(experts, hidden_states, expert_ids, weights) -> output` in transformers' experts interface;
`experts_implementation` of a model chooses one by name. Engines of transformers take no unused slots, so they never see
one:

* flat: the used (token, expert, weight) pairs, as a top-1 call on `P = sum of k_t` rows. Cost follows the experts used.
* padded: every token keeps its K slots and an unused one becomes expert 0 with weight 0. Shapes are static, as
  compilation needs them; the products of unused slots are paid for.

Both give the same result. An engine of ours knows nothing of what an expert is: the layout's `expert_ffn(linear, rows,
activations)` writes its FFN down once, and the engine supplies `linear`, the product of rows with the weights of their
experts. `activations` (T, K, r) is what low-rank experts have already computed when they chose (see
low_rank_experts.py), None for all others.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import ExpertsInterface, grouped_linear
from .routing import Routing

Linear = Callable[[Tensor, Tensor], Tensor]  # rows (P, in) and weights (E, out, in) -> (P, out)


def run_experts(
    experts: nn.Module,
    hidden_states: Tensor,
    routing: Routing,
    fills_every_slot: bool,
    activations: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the experts that every token uses, in the form that suits the moment.

    Args:
        experts: a layout module, called as `experts(hidden_states, expert_ids, weights)`.
        hidden_states: (T, D).
        routing: weights in the dtype of `hidden_states`.
        fills_every_slot: no slot is unused, so the padded form wastes nothing.
        activations: (T, E, r) of `experts.project`, if the experts were ranked by them.

    Returns:
        (T, D). Every expert parameter and every routing weight takes part in the graph, even if no pair is used.
    """
    if fills_every_slot or torch.compiler.is_compiling():
        if hidden_states.shape[0] > 0:
            return run_padded(experts, hidden_states, routing, activations)
    return run_flat(experts, hidden_states, routing, activations)


def run_padded(
    experts: nn.Module, hidden_states: Tensor, routing: Routing, activations: Tensor | None = None
) -> Tensor:
    """One call with (T, K) slots; unused ones are expert 0 with weight 0."""
    expert_ids = routing.expert_ids.masked_fill(~routing.used, 0)
    if activations is None:
        return experts(hidden_states, expert_ids, routing.weights)
    num_tokens, num_slots = expert_ids.shape
    token = torch.arange(num_tokens, device=expert_ids.device).repeat_interleave(num_slots)
    selected = experts.select(hidden_states, activations, token, expert_ids.flatten())
    return experts(hidden_states, expert_ids, routing.weights, selected.unflatten(0, expert_ids.shape))


def run_flat(experts: nn.Module, hidden_states: Tensor, routing: Routing, activations: Tensor | None = None) -> Tensor:
    """One call with (P, 1) slots, P = number of used pairs."""
    token, slot = routing.used.nonzero(as_tuple=True)  # (P,), ordered by token
    output = torch.zeros_like(hidden_states)
    if token.numel() == 0:
        # An engine's answer to an empty call may be cut off from the graph; a parameter without a gradient makes
        # data-parallel training hang.
        row = hidden_states.new_zeros(1, hidden_states.shape[-1])
        idle = experts(row, token.new_zeros(1, 1), row.new_zeros(1, 1))
        return output + 0.0 * (idle.sum() + routing.weights.sum())
    expert_ids = routing.expert_ids[token, slot]
    weights = routing.weights[token, slot]
    pairs = (hidden_states[token], expert_ids[:, None], weights[:, None])
    if activations is not None:
        pairs += (experts.select(hidden_states, activations, token, expert_ids)[:, None],)
    return output.index_add(0, token, experts(*pairs))


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same tensors in the dtype that autocast computes products in, where it is on."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)


def reference_experts(
    experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, activations: Tensor | None = None
) -> Tensor:
    """Every expert on every token, weighted by what the routing gives it: slow, and plain to see that it is right."""
    output = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        chosen = expert_ids == expert  # (T, K)
        own = None if activations is None else (activations * chosen[..., None]).sum(1)  # (T, r)
        expert_output = experts.expert_ffn(partial(_one_expert, expert), hidden_states, own)
        output = output + (weights * chosen).sum(-1, keepdim=True) * expert_output
    return output


def eager_experts(
    experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, activations: Tensor | None = None
) -> Tensor:
    """One used expert after the other, on its tokens."""
    output = torch.zeros_like(hidden_states)
    for expert in expert_ids.unique().tolist():
        if expert == experts.num_experts:  # how expert parallelism marks the experts of other processes
            continue
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        own = None if activations is None else activations[token, slot]
        expert_output = experts.expert_ffn(partial(_one_expert, expert), hidden_states[token], own)
        output = output.index_add(0, token, (expert_output * weights[token, slot, None]).to(output.dtype))
    return output


def _one_expert(expert: int, rows: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rows, weight[expert])


def ragged_experts(
    experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, activations: Tensor | None = None
) -> Tensor:
    """Pairs sorted by expert once, and one product per used expert and projection."""
    order = expert_ids.flatten().argsort(stable=True)  # (P,) pairs by expert
    counts = expert_ids.flatten().bincount(minlength=experts.num_experts).tolist()[: experts.num_experts]
    order = order[: sum(counts)]  # expert parallelism gives the experts of other processes the id E
    linear = partial(_ragged_linear, counts)
    return _on_sorted_pairs(experts, hidden_states, order, expert_ids, weights, activations, linear)


def grouped_experts(
    experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, activations: Tensor | None = None
) -> Tensor:
    """Pairs sorted by expert once, and transformers' grouped product: static shapes, which can be compiled."""
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    # The last pairs may belong to expert E; they are computed with the last expert and cleared.
    counts = F.one_hot(flat, experts.num_experts + 1).sum(0)[: experts.num_experts]
    offsets = counts.cumsum(0)
    offsets[-1] = flat.shape[0]
    weights = weights.masked_fill(expert_ids == experts.num_experts, 0.0)
    linear = partial(_grouped_linear, offsets.to(torch.int32))
    return _on_sorted_pairs(experts, hidden_states, order, expert_ids, weights, activations, linear)


def _on_sorted_pairs(
    experts: nn.Module,
    hidden_states: Tensor,
    order: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    activations: Tensor | None,
    linear: Linear,
) -> Tensor:
    """Gather the pairs in this order, apply their experts, weight the results and add them up by token."""
    rows = order // expert_ids.shape[-1]  # (P,) token of each pair
    own = None if activations is None else activations.flatten(0, 1)[order]
    pair_output = experts.expert_ffn(linear, hidden_states[rows], own)
    weighted = pair_output * weights.flatten()[order][:, None]
    output = torch.zeros_like(hidden_states, dtype=weighted.dtype).index_add(0, rows, weighted)
    return output.to(hidden_states.dtype)


def _grouped_linear(offsets: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    rows, weight = cast_for_autocast(rows, weight)
    return grouped_linear(rows, weight, offsets)


def _ragged_linear(counts: list[int], rows: Tensor, weight: Tensor) -> Tensor:
    rows, weight = cast_for_autocast(rows, weight)
    return _RaggedLinear.apply(rows, weight, counts)


class _RaggedLinear(torch.autograd.Function):
    """Rows sorted by expert times the weights of their experts, (P, in) -> (P, out).

    Indexing `weight[e]` under autograd would allocate a gradient of the whole (E, ...) tensor for every expert; here
    each expert's gradient is written into its slice of one.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        output = rows.new_empty(rows.shape[0], weight.shape[1])
        for expert, part in _slices(counts):
            torch.mm(rows[part], weight[expert].t(), out=output[part])
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The engine 'ragged' has no second derivatives: use experts_implementation='eager'.")
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = torch.empty_like(rows), torch.zeros_like(weight)
        for expert, part in _slices(ctx.counts):
            torch.mm(grad_output[part], weight[expert], out=grad_rows[part])
            torch.mm(grad_output[part].t(), rows[part], out=grad_weight[expert])
        return grad_rows, grad_weight, None


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any."""
    start, slices = 0, []
    for expert, count in enumerate(counts):
        if count:
            slices.append((expert, slice(start, start + count)))
        start += count
    return slices


ENGINES = {"reference": reference_experts, "eager": eager_experts, "ragged": ragged_experts}
# transformers keeps the name `eager` for the forward that the experts class itself defines.
for _name in ("reference", "ragged"):
    ExpertsInterface.register(_name, ENGINES[_name])
