# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""The experts of a layer as one operator on a CPU, whose cost follows the used pairs: what the engine `ragged` runs.

Shapes as in routing.py; P used (token, expert) pairs, n rows of one expert, W its width. The pairs are sorted by expert
once. Each expert gathers its rows, runs its FFN on them and adds the weighted result to the output while all of it is
in the cache; nothing of the size (T, E, ...) or (P, D) exists. What depends on the data, the number of rows of every
expert, stays inside of the operator, so that compilers see static shapes only.

With w the weight of a pair, an expert is `y = down(w * inner)`, `inner = act(gate) * up`. The routing weight stands
before the last product, because then the backward pass needs no y: with `d = down^T g` the gradient of w is
`sum(d * inner)`, and that of `inner` is `w * d`.

Gradients of weights are written into the slices of one tensor. Nothing depends on the order in which threads finish. Of
the forward pass, `pre` (P, 2W ...) is kept, the rows before the activation; or nothing, and it is computed again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .packing import packed_weights
from .products import Products, fastest_products, portable_products

aten = torch.ops.aten


class Activation(NamedTuple):
    """An elementwise function and its gradient: `backward(grad_output, inputs)`."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "silu": Activation(F.silu, aten.silu_backward),
    "gelu": Activation(F.gelu, aten.gelu_backward),
    "gelu_pytorch_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh")
    ),
    "relu": Activation(F.relu, lambda grad, x: aten.threshold_backward(grad, x, 0)),
}
ACTIVATION_NAMES = {type(ACT2FN[name]): name for name in ("swish", *ACTIVATIONS)} | {type(ACT2FN["swish"]): "silu"}


class SwigluLayout:
    """Weights gate_up (E, 2W, D), down (E, D, W); `pre` is [gate, up]."""

    weight_names = ("gate_up_proj", "down_proj")

    @staticmethod
    def num_columns(weights: Sequence[Tensor]) -> int:
        """Columns of `pre`."""
        return weights[0].shape[-2]

    @staticmethod
    def forward(
        products: Products, rows: Tensor, weights: Sequence[Tensor], known: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """`pre` of the rows (n, D) of one expert, written into `out` if given; `known` is not used."""
        return products.forward(rows, weights[0], out)

    @staticmethod
    def backward(
        products: Products,
        rows: Tensor,
        weights: Sequence[Tensor],
        pre: Tensor,
        grad: Tensor,
        grad_weights: Sequence[Tensor | None],
    ) -> Tensor:
        """Gradient (n, D) of the rows from that of gate and up (n, 2W); fills the gradients that are asked for."""
        if grad_weights[0] is not None:
            products.grad_weight(grad, rows, grad_weights[0])
        return products.grad_rows(grad, weights[0])


class LowRankLayout:
    """Weights gate_down (E, r, D), gate_up (E, W, r), up (E, W, D), down (E, D, W); `pre` is [gate, up, activation]."""

    weight_names = ("gate_down_proj", "gate_up_proj_lowrank", "up_proj", "down_proj")

    @staticmethod
    def num_columns(weights: Sequence[Tensor]) -> int:
        """Columns of `pre`."""
        return 2 * weights[2].shape[-2] + weights[0].shape[-2]

    @classmethod
    def forward(
        cls, products: Products, rows: Tensor, weights: Sequence[Tensor], known: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """`pre` of the rows (n, D) of one expert, written into `out` if given; `known` (n, r) is its activation."""
        gate_down, gate_up, up, _ = weights
        width = up.shape[0]
        pre = rows.new_empty(rows.shape[0], cls.num_columns(weights)) if out is None else out
        activation = pre[:, 2 * width :]
        if known is None:
            products.forward(rows, gate_down, activation)
        else:
            activation.copy_(known)
        products.forward(activation, gate_up, pre[:, :width])
        products.forward(rows, up, pre[:, width : 2 * width])
        return pre

    @staticmethod
    def backward(
        products: Products,
        rows: Tensor,
        weights: Sequence[Tensor],
        pre: Tensor,
        grad: Tensor,
        grad_weights: Sequence[Tensor | None],
    ) -> Tensor:
        """Gradient (n, D) of the rows from that of gate and up (n, 2W); fills the gradients that are asked for."""
        gate_down, gate_up, up, _ = weights
        width = up.shape[0]
        grad_gate, grad_up = grad[:, :width], grad[:, width:]
        grad_activation = products.grad_rows(grad_gate, gate_up)
        inputs = ((grad_activation, rows), (grad_gate, pre[:, 2 * width :]), (grad_up, rows))
        for (grad_rows, own_rows), grad_weight in zip(inputs, grad_weights[:3], strict=True):
            if grad_weight is not None:
                products.grad_weight(grad_rows, own_rows, grad_weight)
        return products.grad_rows(grad_activation, gate_down).add_(products.grad_rows(grad_up, up))


class SplitLayout:
    """Weights gate (E, W, D), up (E, W, D), down (E, D, W), as of a dense FFN; `pre` is [gate, up]."""

    weight_names = ("gate_proj", "up_proj", "down_proj")

    @staticmethod
    def num_columns(weights: Sequence[Tensor]) -> int:
        """Columns of `pre`."""
        return 2 * weights[0].shape[-2]

    @classmethod
    def forward(
        cls, products: Products, rows: Tensor, weights: Sequence[Tensor], known: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """`pre` of the rows (n, D) of one expert, written into `out` if given; `known` is not used."""
        pre = rows.new_empty(rows.shape[0], cls.num_columns(weights)) if out is None else out
        for weight, part in zip(weights[:2], pre.chunk(2, dim=1), strict=True):
            products.forward(rows, weight, part)
        return pre

    @staticmethod
    def backward(
        products: Products,
        rows: Tensor,
        weights: Sequence[Tensor],
        pre: Tensor,
        grad: Tensor,
        grad_weights: Sequence[Tensor | None],
    ) -> Tensor:
        """Gradient (n, D) of the rows from that of gate and up (n, 2W); fills the gradients that are asked for."""
        grad_gate, grad_up = grad.chunk(2, dim=1)
        for grad_part, grad_weight in zip((grad_gate, grad_up), grad_weights[:2], strict=True):
            if grad_weight is not None:
                products.grad_weight(grad_part, rows, grad_weight)
        return products.grad_rows(grad_gate, weights[0]).add_(products.grad_rows(grad_up, weights[1]))


LAYOUTS = {"swiglu": SwigluLayout, "low_rank": LowRankLayout, "split": SplitLayout}


class _Pairs(NamedTuple):
    """The used slots, sorted by expert."""

    slots: Tensor  # (P,) int64, of T * K
    counts: list[int]  # (E,)


class _Expert(NamedTuple):
    """One used expert and its pairs."""

    index: int
    part: slice  # of the P sorted pairs
    token: Tensor  # (n,)
    routing_weight: Tensor  # (n, 1), in the dtype of the products
    products: Products
    weights: list[Tensor]  # of this expert, in the dtype of the products

    def gather(self, tokens: Tensor) -> Tensor:
        """Rows (n, D) of (T, D), in the dtype of the products."""
        return _as(self.products.dtype, tokens.index_select(0, self.token))


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    # A call that changes nothing takes time, too, which a step with a few tokens would notice.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _sort(expert_ids: Tensor, weights: Sequence[Tensor]) -> _Pairs:
    num_experts = weights[0].shape[0]
    flat = expert_ids.flatten()
    counts = torch.bincount(flat, minlength=num_experts).tolist()[:num_experts]
    return _Pairs(flat.argsort(stable=True)[: sum(counts)], counts)


def _used_experts(
    pairs: _Pairs,
    expert_ids: Tensor,
    routing_weights: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    allow_packed: bool = False,
) -> Iterator[_Expert]:
    """One after the other; their weights are converted, if need be, when their turn comes."""
    tokens = pairs.slots // expert_ids.shape[-1]
    routing_weights = routing_weights.flatten()[pairs.slots, None]
    start = 0
    for index, count in enumerate(pairs.counts):
        if count:
            part = slice(start, start + count)
            packed = packed_weights(weights, index, count) if allow_packed else None
            if packed:
                products, own = portable_products(dtype), packed
            else:
                products = fastest_products(dtype, count, weights[-1][index].numel())
                own = [_as(products.dtype, weight[index]) for weight in weights]
            yield _Expert(index, part, tokens[part], _as(products.dtype, routing_weights[part]), products, own)
        start += count


# A checkpoint that comes with its own copy of this file has operators of its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::experts", mutates_args=())
@torch.autocast("cpu", enabled=False)
def experts_operator(
    hidden_states: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    weights: list[Tensor],
    known: Tensor | None,
    layout: str,
    activation: str,
    dtype: torch.dtype,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the experts that every token uses.

    Args:
        hidden_states: (T, D), on a CPU.
        expert_ids: (T, K) int64; slots with E are unused.
        routing_weights: (T, K).
        weights: of all experts, as the layout says.
        known: (T, E, r) activations of a `low_rank` layout, if the router has computed them; gets no gradient.
        layout: key of LAYOUTS.
        activation: key of ACTIVATIONS.
        dtype: of the products and of what is kept; sums are taken in float32 or better.
        num_kept: rows of `pre` to keep for the backward pass: at least P; or 0, and it computes them again.

    Returns:
        (T, D) in the dtype of the hidden states, and `pre` (num_kept, ...) without a gradient.
    """
    first_half = LAYOUTS[layout]
    kept = hidden_states.new_empty(num_kept, first_half.num_columns(weights), dtype=dtype)
    output = _zeros_to_sum(hidden_states, dtype)
    allow_packed = not num_kept and weights[0].dtype == dtype
    pairs = _sort(expert_ids, weights)
    for expert in _used_experts(pairs, expert_ids, routing_weights, weights, dtype, allow_packed):
        own = None if known is None else expert.gather(known[:, expert.index])
        place = kept[expert.part] if num_kept and expert.products.dtype == dtype else None
        pre = first_half.forward(expert.products, expert.gather(hidden_states), expert.weights, own, place)
        if num_kept and place is None:
            kept[expert.part] = pre
        down = expert.weights[-1]
        gate, up = pre.split(down.shape[-1], dim=1)[:2]
        inner = ACTIVATIONS[activation].forward(gate).mul_(up).mul_(expert.routing_weight)
        output.index_add_(0, expert.token, _as(output.dtype, expert.products.forward(inner, down)))
    return _as(hidden_states.dtype, output), kept


@torch.library.custom_op(f"{_NAMESPACE}::experts_backward", mutates_args=())
@torch.autocast("cpu", enabled=False)
def _experts_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    weights: list[Tensor],
    kept: Tensor,
    layout: str,
    activation: str,
    dtype: torch.dtype,
    needed: list[bool],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of hidden states, routing weights and weights; an empty tensor for a weight that needs none."""
    first_half, act = LAYOUTS[layout], ACTIVATIONS[activation]
    pairs = _sort(expert_ids, weights)
    grad_hidden = _zeros_to_sum(hidden_states, dtype)
    grad_routing = routing_weights.new_zeros(routing_weights.numel())
    grad_weights = [torch.empty_like(w) if need else w.new_empty(0) for w, need in zip(weights, needed, strict=True)]
    for expert in (expert for expert, count in enumerate(pairs.counts) if not count):
        for grad in grad_weights:
            grad[expert : expert + 1].zero_()
    for expert in _used_experts(pairs, expert_ids, routing_weights, weights, dtype):
        products, down = expert.products, expert.weights[-1]
        width = down.shape[-1]
        own_grads = [grad[expert.index] if need else None for grad, need in zip(grad_weights, needed, strict=True)]
        rows, grad_rows = expert.gather(hidden_states), expert.gather(grad_output)
        if kept.shape[0]:
            pre = _as(products.dtype, kept[expert.part])
        else:
            pre = first_half.forward(products, rows, expert.weights, None, None)
        gate, up = pre.split(width, dim=1)[:2]
        activated = act.forward(gate)
        inner = activated * up
        grad_inner = products.grad_rows(grad_rows, down)
        grad_routing[pairs.slots[expert.part]] = (grad_inner * inner).sum(-1, dtype=grad_routing.dtype)
        if own_grads[-1] is not None:
            products.grad_weight(grad_rows, inner.mul_(expert.routing_weight), own_grads[-1])
        grad_inner.mul_(expert.routing_weight)
        grad_pre = pre.new_empty(pre.shape[0], 2 * width)
        torch.mul(grad_inner, activated, out=grad_pre[:, width:])
        grad_pre[:, :width] = act.backward(grad_inner.mul_(up), gate)
        grad_rows = first_half.backward(products, rows, expert.weights, pre, grad_pre, own_grads)
        grad_hidden.index_add_(0, expert.token, _as(grad_hidden.dtype, grad_rows))
    return _as(hidden_states.dtype, grad_hidden), grad_routing.view(routing_weights.shape), grad_weights


def _zeros_to_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous zeros of its shape, precise enough to add many terms of this dtype up."""
    dtype = torch.promote_types(torch.promote_types(tensor.dtype, dtype), torch.float32)
    return tensor.new_zeros(tensor.shape, dtype=dtype)


@experts_operator.register_fake
def _(
    hidden_states: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    weights: list[Tensor],
    known: Tensor | None,
    layout: str,
    activation: str,
    dtype: torch.dtype,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    output = hidden_states.new_empty(hidden_states.shape)
    return output, output.new_empty(num_kept, LAYOUTS[layout].num_columns(weights), dtype=dtype)


@_experts_backward.register_fake
def _(
    grad_output: Tensor,
    hidden_states: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    weights: list[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    needed = options[-1]
    grad_weights = [torch.empty_like(w) if need else w.new_empty(0) for w, need in zip(weights, needed, strict=True)]
    return hidden_states.new_empty(hidden_states.shape), routing_weights.new_empty(routing_weights.shape), grad_weights


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    hidden_states, expert_ids, routing_weights, weights, _, *ctx.options, _ = inputs
    ctx.save_for_backward(hidden_states, expert_ids, routing_weights, output[1], *weights)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, _: None) -> tuple:
    if grad_output is None:
        return None, None, None, [None] * len(ctx.needs_input_grad[3]), None, None, None, None, None
    hidden_states, expert_ids, routing_weights, kept, *weights = ctx.saved_tensors
    needed = ctx.needs_input_grad[3]
    grad_hidden, grad_routing, grad_weights = _experts_backward(
        grad_output, hidden_states, expert_ids, routing_weights, weights, kept, *ctx.options, needed
    )
    grad_weights = [grad if need else None for grad, need in zip(grad_weights, needed, strict=True)]
    return grad_hidden, None, grad_routing, grad_weights, None, None, None, None, None


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("The engine 'ragged' has no second derivatives: use experts_implementation='eager'.")


experts_operator.register_autograd(_differentiate, setup_context=_keep)
_experts_backward.register_autograd(_refuse)
