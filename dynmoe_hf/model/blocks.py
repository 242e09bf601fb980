# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""The FFN half of a decoder layer: dense, a mixture of experts, or two of them in sequence. Shapes as in routing.py."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .attention import DynMoeRMSNorm
from .configuration_dynmoe import DynMoeConfig
from .dispatch import run_dense, run_experts
from .expert_selectors import SELECTORS, Selector
from .methods import RoutingSpec, bank_spec, initial_threshold, part_options
from .routing import Routing, RoutingContext, without_autocast
from .scorers import SCORERS

ExpertsBuilder = Callable[[RoutingSpec, DynMoeConfig], nn.Module]  # from the specification of a router to its experts


class DynMoeMLP(nn.Module):
    """`down(act(gate x) * up x)`: the FFN of dense layers and of the shared experts."""

    def __init__(self, config: DynMoeConfig, intermediate_size: int) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return run_dense(self, hidden_states)


class DynMoeBlock(nn.Module):
    """A mixture-of-experts FFN: scorer (`gate`), selector, experts, and shared experts if any.

    Args:
        config: of the model.
        layer_idx: its decoder layer.
        build_experts: builds the experts module of its specification.
        bank: 0 or 1 in a cartesian layer.
    """

    def __init__(
        self, config: DynMoeConfig, layer_idx: int, build_experts: ExpertsBuilder, bank: int | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.bank = bank
        self.router_dtype = config.router_dtype
        self.spec = spec = bank_spec(config.routing_for(layer_idx), bank)
        self.gate = SCORERS[spec["scorer"]["type"]](part_options("scorer", spec["scorer"]), config)
        self.selector = build_selector(config, layer_idx, bank)
        self.experts = build_experts(spec, config)
        self.output_bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.moe_output_bias else None
        self.shared_experts = self.shared_expert_gate = None
        if config.num_shared_experts:
            width = config.shared_expert_intermediate_size or config.num_shared_experts * config.moe_intermediate_size
            self.shared_experts = DynMoeMLP(config, width)
            self.mix = (config.routed_expert_weight, config.shared_expert_weight)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    @property
    def statistic(self) -> str | None:
        """The row statistic of attention that the selector reads."""
        return self.selector.statistic

    def route(self, hidden_states: Tensor, context: RoutingContext) -> Routing:
        """Score and select for normalised FFN inputs (T, D); padding selects nothing."""
        if self.gate.reads_norms and context.expert_norms is None:
            context = context._replace(expert_norms=self.experts(hidden_states)[0])
        context = context._replace(hidden_states=hidden_states)
        with without_autocast(hidden_states.device.type):
            scores = self.gate(hidden_states, context)
            logits = scores.logits.to(hidden_states.dtype) if self.router_dtype == "model" else scores.logits
            routing = self.selector(logits, context)
        routing = routing._replace(
            weights=routing.weights.to(hidden_states.dtype),
            logits=scores.logits,
            probs=routing.probs.float(),
            state=context.state if scores.state is None else scores.state,
        )
        return routing.masked(context.token_mask)

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> tuple[Tensor, Routing]:
        """(B, S, D) -> (B, S, D) and the Routing of its B * S tokens."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        activations = None
        if self.gate.reads_norms:
            norms, activations = self.experts(tokens)
            context = context._replace(expert_norms=norms)
        routing = self.route(tokens, context)
        fills_every_slot = self.selector.fills_every_slot and context.token_mask is None
        engine = self.config._experts_implementation
        output = run_experts(self.experts, tokens, routing, engine, fills_every_slot, activations)
        output = output.view_as(hidden_states)
        if self.output_bias is not None:
            output = output + self.output_bias
        if self.shared_experts is not None:
            routed_weight, shared_weight = self.mix
            shared = self.shared_experts(hidden_states)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(hidden_states)) * shared
            output = routed_weight * output + shared_weight * shared
        return output, routing

    def init_weights(self, std: float) -> None:
        """Fill the parameters of the block itself."""
        if self.output_bias is not None:
            init.zeros_(self.output_bias)


class DynMoeCartesianBlock(nn.Module):
    """Two mixtures of experts in sequence: a pair (i, j) of sub-experts, one of each bank, is an expert.

    CartesianMoE (Su et al. 2024, arXiv 2410.16077). The second bank has a router of its own, which reads what the first
    one made of the token.
    """

    def __init__(self, config: DynMoeConfig, layer_idx: int, build_experts: ExpertsBuilder) -> None:
        super().__init__()
        self.composition = config.routing_for(layer_idx)["experts"]["composition"]
        self.sub_layers = nn.ModuleList([DynMoeBlock(config, layer_idx, build_experts, bank) for bank in (0, 1)])
        self.inner_norm = DynMoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def statistic(self) -> str | None:
        """The row statistic of attention that the selectors read."""
        return self.sub_layers[0].statistic

    def forward(
        self, hidden_states: Tensor, outer_norm: Callable[[Tensor], Tensor], context: RoutingContext
    ) -> tuple[Tensor, tuple[Routing, Routing]]:
        """The residual stream (B, S, D) before -> after the FFN half of the layer, and the Routing of each bank.

        Args:
            outer_norm: the layer's own norm. It stands before bank A, in the post-norm compositions at the end.
        """
        postnorm = self.composition.startswith("postnorm")
        first, routing_a = self.sub_layers[0](hidden_states if postnorm else outer_norm(hidden_states), context)
        inner = self.inner_norm(first if self.composition == "nested" else hidden_states + first)
        second, routing_b = self.sub_layers[1](inner, context._replace(state=routing_a.state))
        if self.composition == "prenorm":
            residual = hidden_states + first
        else:
            residual = inner if self.composition == "postnorm" else hidden_states
        output = residual + second
        return outer_norm(output) if postnorm else output, (routing_a, routing_b)


def build_selector(config: DynMoeConfig, layer_idx: int, bank: int | None) -> Selector:
    """The selector of one router."""
    layer_spec = config.routing_for(layer_idx)
    spec = bank_spec(layer_spec, bank)
    selector = SELECTORS[spec["selector"]["type"]](part_options("selector", spec["selector"]), config)
    if spec["controller"]["type"] != "none":
        selector.control(initial_threshold(layer_spec, config))
    return selector
