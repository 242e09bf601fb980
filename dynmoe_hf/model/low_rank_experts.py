# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Low-rank experts, whose own activations can choose among them.

Autonomy-of-Experts, Lv et al. 2025, arXiv 2501.13074, section 3.

Shapes as in routing.py; `r` rank, `W` width of an expert, `P` used (token, expert) pairs. Every expert runs the first
half of its gate projection on every token, `C` (T, E, r), and the selected ones go on from it. `C` is as large as the
activations of many experts, so it is not kept for the backward pass: what that needs is computed again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from .dispatch import ENGINES, Linear, cast_for_autocast, eager_experts, grouped_experts
from .expert_layouts import LowRankOptions
from .quantized import dequantized


class LowRankExperts(nn.Module):
    """`down(act(gate_up (gate_down x)) * up x)`: SwiGLU experts with a factorised gate.

    Our own engines are the ones of their names. transformers' own engines know only the fused SwiGLU layout; for their
    names our grouped engine stands in, or `eager` for float64 and for sizes that are no multiples of 8.
    """

    layout = "low_rank"

    def __init__(self, options: LowRankOptions, config: Any) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.num_experts = config.num_experts
        hidden_size, rank, width = config.hidden_size, options.rank_for(config), options.width_for(config)
        self.gate_down_proj = nn.Parameter(torch.empty(self.num_experts, rank, hidden_size))
        self.gate_up_proj_lowrank = nn.Parameter(torch.empty(self.num_experts, width, rank))
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.expert_dropout
        self.is_aligned = all(size % 8 == 0 for size in (hidden_size, rank, width))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        activations: Tensor | None = None,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(T, D), expert ids (T, K), weights (T, K) -> (T, D); or `project`, where nothing is chosen yet.

        Args:
            activations: (T, K, r), what `project` gave for these experts.
            options: what the engine of dispatch.py takes beside them.
        """
        if top_k_index is None:
            return self.project(hidden_states)
        if activations is not None:
            if not torch.compiler.is_compiling():
                weight = dequantized(self.gate_down_proj)
                activations = _KnownActivations.apply(hidden_states, weight, activations, top_k_index)
            options["activations"] = activations
        can_group = self.is_aligned and hidden_states.dtype != torch.float64
        default = grouped_experts if can_group else eager_experts
        engine = ENGINES.get(self.config._experts_implementation, default)
        return engine(self, hidden_states, top_k_index, top_k_weights, **options)

    def expert_ffn(self, linear: Linear, rows: Tensor, activations: Tensor | None = None) -> Tensor:
        """The experts' FFN of rows (P, D), from their activations (P, r) if these are known."""
        if activations is None:
            activations = linear(rows, self.gate_down_proj)
        gate = linear(activations, self.gate_up_proj_lowrank)
        inner = F.dropout(self.act_fn(gate) * linear(rows, self.up_proj), self.dropout, self.training)
        return linear(inner, self.down_proj)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Norms (T, E) float32 of every expert's activation, and the activations (T, E, r), which carry no gradient.

        The forward that gets those of the used experts back restores their gradient.
        """
        weight = dequantized(self.gate_down_proj)
        if torch.compiler.is_compiling():  # the compiler decides itself what it keeps
            activations = _project(*cast_for_autocast(hidden_states, weight))
            return _norm(activations), activations
        return _ActivationNorms.apply(hidden_states, weight)

    def init_weights(self, std: float) -> None:
        """Fill every parameter."""
        down_std = std if self.options.down_init_std is None else self.options.down_init_std
        init.normal_(self.gate_down_proj, mean=0.0, std=down_std)
        for weight in (self.gate_up_proj_lowrank, self.up_proj, self.down_proj):
            init.normal_(weight, mean=0.0, std=std)


def _project(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """(T, D) and (E, r, D) -> (T, E, r), one product."""
    return F.linear(hidden_states, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


def _norm(activations: Tensor) -> Tensor:
    """Euclidean norm in float32: rounded to bfloat16, norms of different experts would often be equal."""
    return torch.linalg.vector_norm(activations, dim=-1, dtype=torch.promote_types(activations.dtype, torch.float32))


class _ActivationNorms(torch.autograd.Function):
    """`(hidden_states, weight) -> (norms, activations)`, which keeps its inputs only, as they came."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        activations = _project(*cast_for_autocast(hidden_states, weight))
        norms = _norm(activations)
        ctx.save_for_backward(hidden_states, weight)
        ctx.dtype = activations.dtype
        ctx.mark_non_differentiable(activations)
        return norms, activations

    @staticmethod
    def backward(ctx: Any, grad_norms: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden_states, weight = ctx.saved_tensors
        grad_hidden = _zeros_to_sum(hidden_states)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for expert in range(weight.shape[0]):
            # Without a loss over all experts, only tokens that use this one have a gradient here.
            rows = grad_norms[:, expert].nonzero().squeeze(-1)
            inputs, own = hidden_states[rows].to(ctx.dtype), weight[expert].to(ctx.dtype)
            activations = F.linear(inputs, own)
            norms = _norm(activations)
            scale = torch.where(norms > 0, grad_norms[rows, expert] / norms, 0.0)
            grad = (scale[:, None] * activations).to(ctx.dtype)
            if grad_weight is not None:
                grad_weight[expert] = grad.t() @ inputs
            grad_hidden.index_add_(0, rows, (grad @ own).to(grad_hidden.dtype))
        return grad_hidden.to(hidden_states.dtype), grad_weight


class _KnownActivations(torch.autograd.Function):
    """The activations (T, K, r) as they came, with the gradient of `hidden_states @ weight[expert_ids]^T`."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, activations: Tensor, expert_ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, weight, expert_ids)
        return activations.view_as(activations)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight, expert_ids = ctx.saved_tensors
        grad_hidden = _zeros_to_sum(hidden_states)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for expert in range(weight.shape[0]):
            token, slot = (expert_ids == expert).nonzero(as_tuple=True)
            grad = grad_output[token, slot]
            if grad_weight is not None:
                grad_weight[expert] = grad.t() @ hidden_states[token].to(grad.dtype)
            grad_hidden.index_add_(0, token, (grad @ weight[expert].to(grad.dtype)).to(grad_hidden.dtype))
        return grad_hidden.to(hidden_states.dtype), grad_weight, None, None


def _zeros_to_sum(tensor: Tensor) -> Tensor:
    """Zeros of the same shape, precise enough to add many terms up."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
