# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""How a Routing reaches the experts: the two forms of a call, and our own engines.

An engine is a function `(experts, hidden_states, expert_ids, weights) -> output` in transformers' experts interface;
`experts_implementation` of a model chooses one by name. Engines of transformers take no unused slots, so they never see
one:

* flat: the used (token, expert, weight) pairs, as a top-1 call on `P = sum of k_t` rows. Cost follows the experts used.
* padded: every token keeps its K slots and an unused one becomes expert 0 with weight 0. Shapes are static, as
  compilation needs them; the products of unused slots are paid for.

Both give the same result. `ragged` needs neither: it takes the K slots with the unused ones among them.

`reference`, `eager` and `grouped` know nothing of what an expert is: the layout's `expert_ffn(linear, rows,
activations)` writes its FFN down once, and the engine supplies `linear`, the product of rows with the weights of their
experts. `activations` (T, K, r) is what low-rank experts have already computed when they chose (see
low_rank_experts.py), None for all others.

Experts are called, and nothing else of them is used here: what adapters, sharding and offloading make of weights holds
inside of a call only, and a wrapper in the place of the module has none of its attributes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .compat import ExpertsInterface, grouped_linear
from .products import fastest_products, portable_products
from .quantized import dequantized, expert_linear, is_quantized
from .ragged import ACTIVATION_NAMES, ACTIVATIONS, LAYOUTS, experts_operator
from .routing import Routing

Linear = Callable[[Tensor, Tensor], Tensor]  # rows (P, in) and weights (E, out, in) -> (P, out)


def run_experts(
    experts: nn.Module,
    hidden_states: Tensor,
    routing: Routing,
    engine: str,
    fills_every_slot: bool,
    activations: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the experts that every token uses, in the form that suits the engine and the moment.

    Args:
        experts: a layout module, called as `experts(hidden_states, expert_ids, weights)`.
        hidden_states: (T, D).
        routing: weights in the dtype of `hidden_states`.
        engine: the `experts_implementation` of the model.
        fills_every_slot: no slot is unused, so the padded form wastes nothing.
        activations: (T, E, r) of `LowRankExperts.project`, if the experts were ranked by them.

    Returns:
        (T, D). Every expert parameter and every routing weight takes part in the graph, even if no pair is used.

    Raises:
        ValueError: the experts are quantised, and the engine is one of transformers.
    """
    if engine not in ENGINES and is_quantized(getattr(experts, "gate_up_proj", None)):
        raise ValueError(f"The engine {engine!r} cannot read quantised experts: use experts_implementation='ragged'.")
    compiling = torch.compiler.is_compiling()
    # Processes that each have some of the experts exchange every slot of a call, so it may have used ones only.
    is_whole = getattr(experts, "num_experts", routing.num_experts) == routing.num_experts
    if engine in RAGGED and is_whole:
        # The number of pairs is unknown while compiling; room for all slots could be many times what they need.
        options = {"recompute": True} if compiling and not fills_every_slot else {}
        known = {} if activations is None else {"projected": activations}
        return experts(hidden_states, routing.expert_ids, routing.weights, **known, **options)
    if (fills_every_slot or compiling) and hidden_states.shape[0] > 0:
        return run_padded(experts, hidden_states, routing, activations)
    return run_flat(experts, hidden_states, routing, activations)


def run_padded(
    experts: nn.Module, hidden_states: Tensor, routing: Routing, activations: Tensor | None = None
) -> Tensor:
    """One call with (T, K) slots; unused ones are expert 0 with weight 0."""
    expert_ids = routing.expert_ids.masked_fill(~routing.used, 0)
    known = {}
    if activations is not None:
        token = torch.arange(expert_ids.shape[0], device=expert_ids.device)
        known["activations"] = activations[token[:, None], expert_ids]
    return experts(hidden_states, expert_ids, routing.weights, **known)


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
    known = {}
    if activations is not None:
        known["activations"] = activations[token, expert_ids][:, None]
    pair_output = experts(hidden_states[token], expert_ids[:, None], weights[:, None], **known)
    return output.index_add(0, token, pair_output)


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
    # The number of experts marks unused slots, and under expert parallelism the experts of other processes. Where
    # nothing is used, an expert of no rows still makes the parameters part of the graph.
    used = [expert for expert in expert_ids.unique().tolist() if expert < experts.num_experts]
    for expert in used or [0]:
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        own = None if activations is None else activations[token, slot]
        expert_output = experts.expert_ffn(partial(_one_expert, expert), hidden_states[token], own)
        output = output.index_add(0, token, (expert_output * weights[token, slot, None]).to(output.dtype))
    return output


def _one_expert(expert: int, rows: Tensor, weight: Tensor) -> Tensor:
    return expert_linear(rows, weight, expert)


def ragged_experts(
    experts: nn.Module,
    hidden_states: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    projected: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """The used pairs sorted by expert once, and nothing computed for others: ragged.py, or `grouped_experts` on a GPU.

    Args:
        projected: (T, E, r) of `LowRankExperts.project`, if the experts were ranked by it.
        recompute: compute the rows before the activation again in the backward pass instead of keeping them.
    """
    if hidden_states.device.type != "cpu":
        return grouped_experts(experts, hidden_states, expert_ids, weights)
    layout, parameters = expert_weights(experts)
    # The operator reads plain weights, and drops nothing.
    if any(is_quantized(weight) for weight in parameters) or (experts.training and getattr(experts, "dropout", 0)):
        return eager_experts(experts, hidden_states, expert_ids, weights)
    dtype = cast_for_autocast(hidden_states[:0])[0].dtype
    num_kept = 0
    if torch.is_grad_enabled() and not recompute:
        compiling = torch.compiler.is_compiling()
        num_kept = expert_ids.numel() if compiling else int((expert_ids < experts.num_experts).sum())
    return experts_operator(
        hidden_states, expert_ids, weights, parameters, projected, layout, activation_name(experts), dtype, num_kept
    )[0]


def run_dense(mlp: nn.Module, hidden_states: Tensor) -> Tensor:
    """A dense FFN (..., D) -> (..., D). For `ragged` one expert of all tokens, where that gains faster products."""
    if not _gains_products(mlp, hidden_states):
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(hidden_states)) * mlp.up_proj(hidden_states))
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    expert_ids = tokens.new_zeros(tokens.shape[0], 1, dtype=torch.int64)
    weights = [getattr(mlp, name).weight[None] for name in LAYOUTS["split"].weight_names]
    dtype = cast_for_autocast(tokens[:0])[0].dtype
    recompute = mlp.config._experts_implementation == "ragged_recompute"
    num_kept = 0 if recompute or not torch.is_grad_enabled() else tokens.shape[0]
    ones = torch.ones_like(tokens[:, :1])
    output, _ = experts_operator(
        tokens, expert_ids, ones, weights, None, "split", activation_name(mlp), dtype, num_kept
    )
    return output.view_as(hidden_states)


def _gains_products(mlp: nn.Module, hidden_states: Tensor) -> bool:
    if mlp.config._experts_implementation not in RAGGED or torch.compiler.is_compiling():
        return False
    layers = [getattr(mlp, name) for name in LAYOUTS["split"].weight_names]
    # What adapters, quantisation, parallelism and hooks make of a layer happens only where the layer itself is called.
    is_plain = all(
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.bias is None
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        for layer in layers
    )
    if hidden_states.device.type != "cpu" or not is_plain or type(mlp.act_fn) not in ACTIVATION_NAMES:
        return False
    dtype = cast_for_autocast(hidden_states[..., :0])[0].dtype
    num_rows = hidden_states.numel() // hidden_states.shape[-1]
    return fastest_products(dtype, num_rows, layers[0].weight.numel()) != portable_products(dtype)


def expert_weights(experts: nn.Module) -> tuple[str, list[Tensor]]:
    """The layout and the weights of an experts module, one of ours or of a model of transformers.

    Raises:
        ValueError: if the engine `ragged` does not know such experts.
    """
    own_gate = getattr(type(experts), "_apply_gate", None)
    is_plain = (
        getattr(experts, "has_gate", True)
        and getattr(experts, "is_concatenated", True)
        and not getattr(experts, "is_transposed", False)
        and not getattr(experts, "has_bias", False)
        and not getattr(experts, "has_post_expert_norm", False)
        and (hasattr(experts, "expert_ffn") or own_gate is None or own_gate.__name__ == "_default_apply_gate")
    )
    if not is_plain:
        raise ValueError(
            f"The engine 'ragged' runs gated experts without biases only, which {type(experts).__name__} are not: "
            "use experts_implementation='grouped_mm'."
        )
    layout = getattr(experts, "layout", "swiglu")
    return layout, [getattr(experts, name) for name in LAYOUTS[layout].weight_names]


def activation_name(experts: nn.Module) -> str:
    """Key of ACTIVATIONS that an experts module uses.

    Raises:
        ValueError: if the engine `ragged` does not know its derivative.
    """
    name = ACTIVATION_NAMES.get(type(experts.act_fn))
    if name is None:
        raise ValueError(
            f"The engine 'ragged' knows hidden_act {', '.join(ACTIVATIONS)}, got {experts.act_fn}: "
            "use experts_implementation='grouped_mm'."
        )
    return name


def grouped_experts(
    experts: nn.Module, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, activations: Tensor | None = None
) -> Tensor:
    """All slots sorted by expert, unused ones last, and grouped products that end before those.

    Static shapes and no number that the host would have to wait for, as GPUs and graphs of them need it. What the
    products leave in the rows of unused slots is undefined; neither the output nor a gradient contains it.
    """
    used = expert_ids < experts.num_experts
    sorted_ids, order = expert_ids.flatten().sort(stable=True)
    each = torch.arange(experts.num_experts, device=expert_ids.device)
    offsets = torch.searchsorted(sorted_ids, each, right=True).to(torch.int32)
    own = None if activations is None else activations.masked_fill(~used[..., None], 0.0).flatten(0, 1)[order]
    rows = _TokensToPairs.apply(hidden_states, order, used)
    pair_output = experts.expert_ffn(partial(_grouped_linear, offsets), rows, own)
    weights = weights.masked_fill(~used, 0.0).flatten()[order]
    return _PairsToTokens.apply(pair_output * weights[:, None], order, used).to(hidden_states.dtype)


def _grouped_linear(offsets: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    rows, weight = cast_for_autocast(rows, dequantized(weight))
    return grouped_linear(rows, weight, offsets)


def _tokens_to_pairs(tokens: Tensor, order: Tensor, used: Tensor) -> Tensor:
    return tokens.index_select(0, order // used.shape[-1])


def _pairs_to_tokens(pairs: Tensor, order: Tensor, used: Tensor) -> Tensor:
    """Each token's sum in the order of its slots, so that it is the same every time."""
    by_slot = pairs.index_select(0, order.argsort()).unflatten(0, used.shape)
    return by_slot.masked_fill(~used[..., None], 0.0).sum(1)


class _TokensToPairs(torch.autograd.Function):
    """(T, D) -> (T * K, D) in this order of the slots; nothing comes back from an unused one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(order, used)
        return _tokens_to_pairs(tokens, order, used)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return _PairsToTokens.apply(grad_output, *ctx.saved_tensors), None, None


class _PairsToTokens(torch.autograd.Function):
    """(T * K, D) in this order of the slots -> sums (T, D) over the used ones."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, order: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(order, used)
        return _pairs_to_tokens(pairs, order, used)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return _TokensToPairs.apply(grad_output, *ctx.saved_tensors), None, None


RAGGED = {"ragged": ragged_experts, "ragged_recompute": partial(ragged_experts, recompute=True)}
ENGINES = {"reference": reference_experts, "eager": eager_experts, **RAGGED}
# transformers keeps the name `eager` for the forward that the experts class itself defines.
for _name in ENGINES.keys() - {"eager"}:
    ExpertsInterface.register(_name, ENGINES[_name])
