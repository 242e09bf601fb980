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
from .products import Products, cast, fastest_products, portable_products

aten = torch.ops.aten
BLOCK_ROWS = 128  # experts with fewer rows than this are taken together


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
    def forward(products: Products, rows: Tensor, weights: Sequence[Tensor], known: Tensor | None, pre: Tensor) -> None:
        """Fill `pre` from the rows (n, D) of one expert; `known` is not used."""
        products.forward(rows, weights[0], pre)

    @staticmethod
    def backward(
        products: Products,
        rows: Tensor,
        weights: Sequence[Tensor],
        pre: Tensor,
        grad: Tensor,
        grad_weights: Sequence[Tensor | None],
        grad_rows: Tensor,
    ) -> None:
        """Fill the gradients of the rows (n, D) and of weights that ask for one, from that of gate and up (n, 2W)."""
        products.grad_weight(grad, rows, grad_weights[0])
        products.grad_rows(grad, weights[0], grad_rows)


class LowRankLayout:
    """Weights gate_down (E, r, D), gate_up (E, W, r), up (E, W, D), down (E, D, W); `pre` is [gate, up, activation]."""

    weight_names = ("gate_down_proj", "gate_up_proj_lowrank", "up_proj", "down_proj")

    @staticmethod
    def num_columns(weights: Sequence[Tensor]) -> int:
        """Columns of `pre`."""
        return 2 * weights[2].shape[-2] + weights[0].shape[-2]

    @staticmethod
    def forward(products: Products, rows: Tensor, weights: Sequence[Tensor], known: Tensor | None, pre: Tensor) -> None:
        """Fill `pre` from the rows (n, D) of one expert; `known` (n, r) is their activation."""
        gate_down, gate_up, up, _ = weights
        width = up.shape[0]
        activation = pre[:, 2 * width :]
        if known is None:
            products.forward(rows, gate_down, activation)
        else:
            activation.copy_(known)
        products.forward(activation, gate_up, pre[:, :width])
        products.forward(rows, up, pre[:, width : 2 * width])

    @staticmethod
    def backward(
        products: Products,
        rows: Tensor,
        weights: Sequence[Tensor],
        pre: Tensor,
        grad: Tensor,
        grad_weights: Sequence[Tensor | None],
        grad_rows: Tensor,
    ) -> None:
        """Fill the gradients of the rows (n, D) and of weights that ask for one, from that of gate and up (n, 2W)."""
        gate_down, gate_up, up, _ = weights
        width = up.shape[0]
        grad_gate, grad_up = grad[:, :width], grad[:, width:]
        grad_activation = products.grad_rows(grad_gate, gate_up)
        products.grad_weight(grad_activation, rows, grad_weights[0])
        products.grad_weight(grad_gate, pre[:, 2 * width :], grad_weights[1])
        products.grad_weight(grad_up, rows, grad_weights[2])
        products.grad_rows(grad_activation, gate_down, grad_rows)
        grad_rows.add_(products.grad_rows(grad_up, up))


class SplitLayout:
    """Weights gate (E, W, D), up (E, W, D), down (E, D, W), as of a dense FFN; `pre` is [gate, up]."""

    weight_names = ("gate_proj", "up_proj", "down_proj")

    @staticmethod
    def num_columns(weights: Sequence[Tensor]) -> int:
        """Columns of `pre`."""
        return 2 * weights[0].shape[-2]

    @staticmethod
    def forward(products: Products, rows: Tensor, weights: Sequence[Tensor], known: Tensor | None, pre: Tensor) -> None:
        """Fill `pre` from the rows (n, D) of one expert; `known` is not used."""
        for weight, part in zip(weights[:2], pre.chunk(2, dim=1), strict=True):
            products.forward(rows, weight, part)

    @staticmethod
    def backward(
        products: Products,
        rows: Tensor,
        weights: Sequence[Tensor],
        pre: Tensor,
        grad: Tensor,
        grad_weights: Sequence[Tensor | None],
        grad_rows: Tensor,
    ) -> None:
        """Fill the gradients of the rows (n, D) and of weights that ask for one, from that of gate and up (n, 2W)."""
        grad_gate, grad_up = grad.chunk(2, dim=1)
        products.grad_weight(grad_gate, rows, grad_weights[0])
        products.grad_weight(grad_up, rows, grad_weights[1])
        products.grad_rows(grad_gate, weights[0], grad_rows)
        grad_rows.add_(products.grad_rows(grad_up, weights[1]))


LAYOUTS = {"swiglu": SwigluLayout, "low_rank": LowRankLayout, "split": SplitLayout}


class _Pairs(NamedTuple):
    """The used slots, sorted by expert."""

    slots: Tensor  # (P,) int64, of T * K
    counts: list[int]  # (E,)


class _Expert(NamedTuple):
    """One used expert."""

    index: int
    part: slice  # of the rows of its block
    weights: list[Tensor]  # (out, in) each, in any dtype or packed


class _Block(NamedTuple):
    """Pairs of one expert, or of several with few: what is done to rows alone is then done to all of them at once."""

    part: slice  # of the P sorted pairs
    slots: Tensor  # (n,) int64, of T * K
    token: Tensor  # (n,)
    routing_weight: Tensor  # (n, 1), in the dtype of the products
    products: Products
    experts: list[_Expert]

    def gather(self, tokens: Tensor) -> Tensor:
        """Rows (n, D) of (T, D), in the dtype of the products."""
        return cast(tokens.index_select(0, self.token), self.products.dtype)

    def empty(self, num_columns: int) -> Tensor:
        """Rows to be filled, in the dtype of the products."""
        return self.routing_weight.new_empty(self.token.shape[0], num_columns)


def _sort(expert_ids: Tensor, weights: Sequence[Tensor]) -> _Pairs:
    num_experts = weights[0].shape[0]
    flat = expert_ids.flatten()
    counts = torch.bincount(flat, minlength=num_experts).tolist()[:num_experts]
    return _Pairs(flat.argsort(stable=True)[: sum(counts)], counts)


def _blocks(
    pairs: _Pairs,
    expert_ids: Tensor,
    routing_weights: Tensor,
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    allow_packed: bool = False,
) -> Iterator[_Block]:
    """The sorted pairs from the first to the last."""
    tokens = pairs.slots // expert_ids.shape[-1]
    routing_weights = routing_weights.flatten()[pairs.slots, None]
    experts: list[_Expert] = []
    start = end = 0
    products = None

    def block() -> _Block:
        part = slice(start, end)
        weight = cast(routing_weights[part], products.dtype)
        return _Block(part, pairs.slots[part], tokens[part], weight, products, experts)

    for index, count in enumerate(pairs.counts):
        if not count:
            continue
        own = packed_weights(weights, index, count) if allow_packed else None
        own_products = portable_products(dtype) if own else fastest_products(dtype, count, weights[-1][index].numel())
        if experts and (end - start + count > BLOCK_ROWS or own_products != products):
            yield block()
            experts, start = [], end
        products = own_products
        experts.append(_Expert(index, slice(end - start, end - start + count), own or [w[index] for w in weights]))
        end += count
    if experts:
        yield block()


def _fill_pre(layout: type, block: _Block, rows: Tensor, known: Tensor | None, pre: Tensor) -> None:
    for expert in block.experts:
        own = None if known is None else known[:, expert.index].index_select(0, block.token[expert.part])
        layout.forward(block.products, rows[expert.part], expert.weights, own, pre[expert.part])


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
    for block in _blocks(pairs, expert_ids, routing_weights, weights, dtype, allow_packed):
        in_place = num_kept and block.products.dtype == dtype
        pre = kept[block.part] if in_place else block.empty(kept.shape[1])
        _fill_pre(first_half, block, block.gather(hidden_states), known, pre)
        if num_kept and not in_place:
            kept[block.part] = pre
        gate, up = pre.split(weights[-1].shape[-1], dim=1)[:2]
        inner = ACTIVATIONS[activation].forward(gate).mul_(up).mul_(block.routing_weight)
        result = block.empty(hidden_states.shape[1])
        for expert in block.experts:
            block.products.forward(inner[expert.part], expert.weights[-1], result[expert.part])
        output.index_add_(0, block.token, cast(result, output.dtype))
    return cast(output, hidden_states.dtype), kept


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
    hidden_size, width = weights[-1].shape[1:]
    pairs = _sort(expert_ids, weights)
    grad_hidden = _zeros_to_sum(hidden_states, dtype)
    grad_routing = routing_weights.new_zeros(routing_weights.numel())
    grad_weights = [torch.empty_like(w) if need else w.new_empty(0) for w, need in zip(weights, needed, strict=True)]
    for expert in (expert for expert, count in enumerate(pairs.counts) if not count):
        for grad in grad_weights:
            grad[expert : expert + 1].zero_()
    for block in _blocks(pairs, expert_ids, routing_weights, weights, dtype):
        products, rows, grad_result = block.products, block.gather(hidden_states), block.gather(grad_output)
        if kept.shape[0]:
            pre = cast(kept[block.part], products.dtype)
        else:
            pre = block.empty(first_half.num_columns(weights))
            _fill_pre(first_half, block, rows, None, pre)
        gate, up = pre.split(width, dim=1)[:2]
        activated = act.forward(gate)
        inner = activated * up
        grad_inner = block.empty(width)
        for expert in block.experts:
            products.grad_rows(grad_result[expert.part], expert.weights[-1], grad_inner[expert.part])
        grad_routing[block.slots] = (grad_inner * inner).sum(-1, dtype=grad_routing.dtype)
        inner.mul_(block.routing_weight)
        grad_inner.mul_(block.routing_weight)
        grad_pre = block.empty(2 * width)
        torch.mul(grad_inner, activated, out=grad_pre[:, width:])
        grad_pre[:, :width] = act.backward(grad_inner.mul_(up), gate)
        grad_rows = block.empty(hidden_size)
        for expert in block.experts:
            part = expert.part
            own = [grad[expert.index] if need else None for grad, need in zip(grad_weights, needed, strict=True)]
            products.grad_weight(grad_result[part], inner[part], own[-1])
            first_half.backward(products, rows[part], expert.weights, pre[part], grad_pre[part], own, grad_rows[part])
        grad_hidden.index_add_(0, block.token, cast(grad_rows, grad_hidden.dtype))
    return cast(grad_hidden, hidden_states.dtype), grad_routing.view(routing_weights.shape), grad_weights


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
