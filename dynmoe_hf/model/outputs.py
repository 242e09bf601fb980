# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""What the models return. Shapes as in routing.py; `V` vocabulary."""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

from .compat import ModelOutput
from .routing import Routing


@dataclass
class DynMoeModelOutput(ModelOutput):
    """Output of the base model.

    Args:
        last_hidden_state: (B, S, D) after the final norm.
        router_logits: one (B * S, E) tensor a router, with `output_router_logits`.
        routing: one Routing a router in the order in which they run, with `output_routing`: None for a dense layer, two
            for a cartesian one.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[Routing | None, ...] | None = None


@dataclass
class DynMoeCausalLMOutput(ModelOutput):
    """Output of the language model and, with other logits, of the other heads.

    Args:
        loss: what training minimises: the task's loss and the weighted auxiliary losses.
        logits: (B, S, V), or what the head predicts.
        lm_loss: the task's loss alone.
        aux_losses: each auxiliary loss by name, without its coefficient; present with labels or `output_router_logits`.
        aux_loss: the load-balance loss among them, with `output_router_logits`.
        router_logits, routing: as in DynMoeModelOutput.
        experts_per_token: (routers,) mean number of experts of a real token, with `output_routing`.
        expert_usage: (routers, E) float32, share of the tokens of the optimizer step that are in this call and use each
            expert; with `balance_scope="global"`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    routing: tuple[Routing | None, ...] | None = None
    experts_per_token: Tensor | None = None
    expert_usage: Tensor | None = None


@dataclass
class DynMoeQuestionAnsweringOutput(ModelOutput):
    """As DynMoeCausalLMOutput, with the logits (B, S) of where the answer starts and ends."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    aux_losses: dict[str, Tensor] | None = None
    routing: tuple[Routing | None, ...] | None = None
    experts_per_token: Tensor | None = None
    expert_usage: Tensor | None = None
