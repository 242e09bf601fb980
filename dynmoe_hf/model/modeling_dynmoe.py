# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""The DynMoE decoder: Llama-style attention, and FFN blocks that are mixtures of experts with selectable routing.

Shapes as in routing.py; `H` attention heads, `V` vocabulary. A decoder layer returns its hidden states and, beside
them, the fields of its Routing; nothing in a layer is changed by a forward pass. The model gathers the Routings, and
the heads turn them into auxiliary losses, outside the code that activation checkpointing may run twice.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN

from .attention import DynMoeAttention, DynMoeRMSNorm, DynMoeRotaryEmbedding
from .blocks import DynMoeBlock, DynMoeCartesianBlock, DynMoeMLP
from .checkpoints import INDEX, refuse_missing, shard_names
from .compat import (
    GradientCheckpointingLayer,
    OutputRecorder,
    can_return_tuple,
    capture_outputs,
    merge_with_config_defaults,
    use_experts_implementation,
)
from .configuration_dynmoe import DynMoeConfig
from .dispatch import Linear, eager_experts
from .losses import TokenWeights, auxiliary_losses, expert_usage, usage_of_all_processes
from .low_rank_experts import LowRankExperts
from .masks import attention_masks, next_positions, visibilities
from .methods import RoutingSpec, part_options
from .outputs import DynMoeCausalLMOutput, DynMoeModelOutput, DynMoeQuestionAnsweringOutput
from .packing import ExpertPacking
from .ragged import ACTIVATION_NAMES
from .routing import Routing, RoutingContext, real_tokens
from .routing_changes import RoutingChanges, build_controller, count_for_controller
from .row_statistics import Visibility
from .scorers import SCORERS, Scorer

AUTO_MAP = {
    "AutoConfig": "configuration_dynmoe.DynMoeConfig",
    "AutoModel": "modeling_dynmoe.DynMoeModel",
    "AutoModelForCausalLM": "modeling_dynmoe.DynMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_dynmoe.DynMoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_dynmoe.DynMoeForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_dynmoe.DynMoeForQuestionAnswering",
}


@use_experts_implementation
class DynMoeExperts(nn.Module):
    """SwiGLU experts with fused weights. The forward written here is the engine `eager`."""

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        width, hidden_size = config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]
        self.dropout = config.expert_dropout

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, D), expert ids (T, K) below E, weights (T, K) -> weighted sums (T, D)."""
        return eager_experts(self, hidden_states, top_k_index, top_k_weights)

    def expert_ffn(self, linear: Linear, rows: Tensor, activations: None = None) -> Tensor:
        """The experts' FFN of rows (P, D); `linear` multiplies each row with the weights of its expert."""
        return linear(self._apply_gate(linear(rows, self.gate_up_proj)), self.down_proj)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        """The inner activations (P, I) from gate and up (P, 2I); the engines of transformers call it by this name."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.dropout(self.act_fn(gate) * up, self.dropout, self.training)

    def init_weights(self, std: float) -> None:
        """Fill every parameter."""
        init.normal_(self.gate_up_proj, mean=0.0, std=std)
        init.normal_(self.down_proj, mean=0.0, std=std)


def build_experts(spec: RoutingSpec, config: DynMoeConfig) -> nn.Module:
    """The experts of one router."""
    if spec["experts"]["type"] == "low_rank":
        return LowRankExperts(part_options("experts", spec["experts"]), config)
    return DynMoeExperts(config)


def build_shared_scorers(config: DynMoeConfig) -> nn.ModuleDict:
    """Scorer type -> what all routers with such a scorer share."""
    shared = nn.ModuleDict()
    for layer in range(config.num_hidden_layers):
        spec = config.routing_for(layer)["scorer"]
        scorer = SCORERS[spec["type"]]
        if config.is_sparse(layer) and scorer.Shared is not None and spec["type"] not in shared:
            shared[spec["type"]] = scorer.Shared(part_options("scorer", spec), config)
    return shared


class DynMoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and FFN, each with its residual."""

    def __init__(self, config: DynMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.self_attn = DynMoeAttention(config, layer_idx)
        self.is_sparse = config.is_sparse(layer_idx)
        self.scorer_type = config.routing_for(layer_idx)["scorer"]["type"]
        self.is_cartesian = self.is_sparse and config.routing_for(layer_idx)["experts"]["type"] == "cartesian"
        if self.is_sparse:
            block = DynMoeCartesianBlock if self.is_cartesian else DynMoeBlock
            self.mlp = block(config, layer_idx, build_experts)
        else:
            self.mlp = DynMoeMLP(config, config.intermediate_size)
        self.input_layernorm = DynMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DynMoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        router_state: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        visibility: Visibility | None = None,
        shared_scorers: nn.ModuleDict | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Hidden states (B, S, D) followed, in a sparse layer, by the fields of the Routing of each of its routers.

        The two tensors that carry gradient come first and by position, as re-entrant checkpointing asks.
        """
        attention_output, _, importance = self.self_attn(
            self.input_layernorm(hidden_states),
            statistic=self.mlp.statistic if self.is_sparse else None,
            visibility=visibility,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        if not self.is_sparse:
            return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)
        context = RoutingContext(
            self.layer_idx,
            token_mask,
            router_state,
            shared=self._shared_scorer(shared_scorers),
            importance=None if importance is None else importance.flatten(),
        )
        # accelerate moves every argument that has a method `to` to the device of the layer: so no argument is a module,
        # only the `__call__` of one.
        if self.is_cartesian:
            hidden_states, (first, second) = self.mlp(hidden_states, self.post_attention_layernorm.__call__, context)
            return (hidden_states, *first, *second)
        ffn_output, routing = self.mlp(self.post_attention_layernorm(hidden_states), context)
        return (hidden_states + ffn_output, *routing)

    def _shared_scorer(self, shared_scorers: nn.ModuleDict | None) -> Callable[..., Any] | None:
        if shared_scorers is None or self.scorer_type not in shared_scorers:
            return None
        return shared_scorers[self.scorer_type].__call__


class DynMoePreTrainedModel(RoutingChanges, ExpertPacking, PreTrainedModel):
    """What all models of the family share: initialisation, the change of routing, losses, saving."""

    config: DynMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DynMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "shared_scorers"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(Scorer, index=0),
        "hidden_states": DynMoeDecoderLayer,
        "attentions": DynMoeAttention,
    }

    def __init__(self, config: DynMoeConfig, *args: Any, **kwargs: Any) -> None:
        config.check()
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As in transformers, with two differences.

        Only safetensors are read, unless `use_safetensors=False` asks for pickled weights. And fresh random numbers, of
        which transformers warns, stand in for missing weights only in heads and routers; everywhere else
        `ignore_mismatched_sizes=True` must ask for them, or `output_loading_info=True` for the list of what is missing.

        Raises:
            ValueError: the checkpoint lacks other weights of the decoder; the index of a folder names other files than
                safetensors beside it.
        """
        index = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "", INDEX)
        if os.path.isfile(index):
            shard_names(index)
        wants_report = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("use_safetensors", True)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        is_checkpoint = pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None
        if is_checkpoint and not (wants_report or kwargs.get("ignore_mismatched_sizes")):
            missing = set(report["missing_keys"])
            if getattr(model, "hf_device_map", None) is None:
                # What a quantised checkpoint lacks is in no report, but still without values.
                missing |= {name for name, parameter in model.named_parameters() if parameter.is_meta}
            refuse_missing(model, sorted(missing))
        return (model, report) if wants_report else model

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in transformers, with `ragged` where nothing is asked for."""
        if requested_experts is None and type(ACT2FN[self.config.hidden_act]) in ACTIVATION_NAMES:
            requested_experts = "ragged"
        return super().get_correct_experts_implementation(requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Each module fills what it owns itself, because transformers asks only the owners of what a checkpoint lacks.
        if not isinstance(module, PreTrainedModel) and hasattr(module, "init_weights"):
            module.init_weights(self.config.initializer_range)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers. The configuration names the class of every Auto class, not only of this model's."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        # FSDP2 puts a class of its own in the place of ours, whose source would be saved in the place of ours.
        current = type(self)
        self.__class__ = next(base for base in current.__mro__ if base.__module__ == __name__)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = current

    def loss_coefficients(self) -> list[dict[str, float]]:
        """Loss name -> coefficient of each router, in the order of `moe_blocks`."""
        return [block.spec["losses"] for block in self.moe_blocks()]

    def _needs_routing(self, output_routing: bool, output_router_logits: bool, has_labels: bool) -> bool:
        wanted = has_labels and any(any(losses.values()) for losses in self.loss_coefficients())
        return output_routing or output_router_logits or wanted

    def _routing_outputs(
        self,
        outputs: DynMoeModelOutput,
        attention_mask: Tensor | None,
        label_counts: Tensor | None,
        output_routing: bool,
        output_router_logits: bool,
        share: Tensor | float,
        usage: Tensor | None,
    ) -> tuple[dict[str, Any], Tensor | float]:
        """The routing fields of a head's output, and the weighted sum of its auxiliary losses.

        Args:
            label_counts: (B,) labels in each sequence.
            share: this call's share of the labels of the optimizer step.
            usage: (routers, E) use of the experts in the whole step, for `balance_scope="global"`.

        Raises:
            ValueError: the usage is given for another scope.
        """
        if outputs.routing is None:
            return {}, 0.0
        hidden_states = outputs.last_hidden_state
        shape = tuple(hidden_states.shape[:2])
        token_mask = real_tokens(attention_mask, *shape)
        routings = [routing for routing in outputs.routing if routing is not None]
        weights = TokenWeights.build(token_mask, label_counts, shape, hidden_states.device)
        config = self.config
        fields: dict[str, Any] = {}
        if usage is not None and config.balance_scope != "global":
            raise ValueError(f"expert_usage is for balance_scope 'global', but it is {config.balance_scope!r}.")
        if config.balance_scope == "global" and routings:
            own = expert_usage(routings, weights)
            fields["expert_usage"] = share * own
            if usage is None and self.training and torch.is_grad_enabled():
                usage = usage_of_all_processes(own, weights)
        fields["aux_losses"], total = auxiliary_losses(
            routings,
            self.loss_coefficients(),
            weights,
            config.balance_scope,
            config.balance_normalize,
            config.aux_reduction,
            [block.layer_idx for block in self.moe_blocks()],
            None if usage is None else usage.to(hidden_states.device),
        )
        if output_router_logits:
            fields["aux_loss"] = fields["aux_losses"].get("load_balance")
        if output_routing:
            tokens = weights.real.sum().clamp_min(1.0)
            per_layer = [routing.num_selected.sum().to(tokens.device) / tokens for routing in routings]
            fields["experts_per_token"] = torch.stack(per_layer) if per_layer else tokens.new_zeros(0)
            fields["routing"] = outputs.routing
        return fields, share * total


class DynMoeModel(DynMoePreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DynMoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.shared_scorers = build_shared_scorers(config)
        self.controller = build_controller(config)
        self.norm = DynMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DynMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> DynMoeModelOutput:
        """Run the decoder; arguments as in transformers.

        Args:
            attention_mask: (B, S) with 1 on real tokens; padding selects no expert.
            output_routing: return the Routing of every router.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; for a paged cache, if a selector
                reads attention.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, sequence_length = hidden_states.shape[:2]
        if position_ids is None:
            position_ids = next_positions(past_key_values, sequence_length, hidden_states.device)
        token_mask = real_tokens(attention_mask, batch_size, sequence_length)
        token_mask = None if token_mask is None else token_mask.reshape(-1)
        where = (hidden_states, attention_mask, past_key_values, position_ids)
        masks = attention_masks(self.config, {layer.self_attn.sliding_window for layer in self.layers}, *where)
        visible = visibilities(self._windows_to_read(), *where, is_paged="cache" in kwargs)
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        count = self.controller is not None and self.training and torch.is_grad_enabled()
        routings: list[Routing | None] = []
        router_state = None
        for layer in self.layers:
            hidden_states, *fields = layer(
                hidden_states,
                router_state,
                attention_mask=masks[layer.self_attn.sliding_window],
                token_mask=token_mask,
                visibility=visible.get(layer.self_attn.sliding_window),
                shared_scorers=self.shared_scorers,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            routed = Routing.unflatten(fields)
            router_state = routed[-1].state if routed else router_state
            if output_routing or count:
                routings += routed or [None]

        if count:
            sparse = [routing for routing in routings if routing is not None]
            count_for_controller(self.controller, self.moe_blocks(), sparse, token_mask)
        return DynMoeModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            routing=tuple(routings) if output_routing else None,
        )

    def _windows_to_read(self) -> dict[int | None, int]:
        """Sliding window -> first layer with it, of those whose selector reads attention."""
        return {
            layer.self_attn.sliding_window: layer.layer_idx
            for layer in reversed(self.layers)
            if layer.is_sparse and layer.mlp.statistic is not None
        }


class DynMoeForCausalLM(DynMoePreTrainedModel, GenerationMixin):
    """The decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__(config)
        self.model = DynMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        logits_to_keep: int | Tensor = 0,
        expert_usage: Tensor | None = None,
        **kwargs: Any,
    ) -> DynMoeCausalLMOutput:
        """Arguments as in transformers, and those of our own.

        With `labels` (B, S), -100 where nothing is to be learnt, `loss` holds the cross-entropy and the weighted
        auxiliary losses. Under `num_items_in_batch` both are this call's share of the whole optimizer step.

        Args:
            output_routing: return the Routing of every layer.
            expert_usage: (routers, E) sum of the `expert_usage` of all calls of the optimizer step, which
                `balance_scope="global"` balances by; without it, by this call in all processes.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routing=self._needs_routing(output_routing, output_router_logits, labels is not None),
            return_dict=True,  # whatever the config says
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        lm_loss, label_counts = None, None
        if labels is not None:
            lm_loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
            shifted = kwargs.get("shift_labels")
            label_counts = ((labels[:, 1:] if shifted is None else shifted) != -100).sum(-1)
        share = share_of_step(label_counts, **kwargs)
        fields, aux_loss = self._routing_outputs(
            outputs, attention_mask, label_counts, output_routing, output_router_logits, share, expert_usage
        )
        return DynMoeCausalLMOutput(
            loss=None if lm_loss is None else lm_loss + aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            lm_loss=lm_loss,
            **fields,
        )


def share_of_step(
    label_counts: Tensor | None, num_items_in_batch: Tensor | int | None = None, **_: Any
) -> Tensor | float:
    """This call's share of the labels of one optimizer step; 1 where nobody says how many those are."""
    if label_counts is None or num_items_in_batch is None:
        return 1.0
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(label_counts.device)
    return label_counts.sum() / num_items_in_batch


class _DynMoeHead(DynMoePreTrainedModel):
    """Base of the heads that are no language model.

    Their forwards name every input, because the Trainer drops the columns of a data set that no argument is named for.
    """

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DynMoeModel(config)

    def _decode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        has_labels: bool,
        output_router_logits: bool | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> tuple[DynMoeModelOutput, dict[str, Any]]:
        """The decoder's outputs, and what `_fields` makes of them."""
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_routing=self._needs_routing(output_routing, output_router_logits, has_labels),
            **(kwargs | {"return_dict": True}),
        )
        wanted = {
            "attention_mask": attention_mask,
            "output_routing": output_routing,
            "output_router_logits": output_router_logits,
        }
        return outputs, wanted

    def _fields(
        self,
        outputs: DynMoeModelOutput,
        wanted: dict[str, Any],
        task_loss: Tensor | None,
        label_counts: Tensor | None,
        num_items_in_batch: Tensor | int | None = None,
        expert_usage: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Everything but the logits of a head's output; `task_loss` is a mean over the labels of this call."""
        share = share_of_step(label_counts, num_items_in_batch)
        fields, aux_loss = self._routing_outputs(
            outputs, label_counts=label_counts, share=share, usage=expert_usage, **wanted
        )
        if task_loss is not None:
            fields |= {"lm_loss": share * task_loss, "loss": share * task_loss + aux_loss}
        names = ("past_key_values", "hidden_states", "attentions", "router_logits")
        return fields | {name: getattr(outputs, name) for name in names}


class DynMoeForSequenceClassification(_DynMoeHead):
    """The decoder with a classifier on the last real token of each sequence."""

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DynMoeCausalLMOutput:
        """`labels`: (B,) classes, (B,) or (B, num_labels) numbers for regression, (B, num_labels) for many labels.

        Raises:
            ValueError: for a batch in which nothing tells where the padding is.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        outputs, wanted = self._decode(*inputs, has_labels=labels is not None, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        rows = torch.arange(logits.shape[0], device=logits.device)
        logits = logits[rows, self._last_real_token(logits.shape, input_ids, attention_mask).to(logits.device)]
        loss = counts = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            counts = labels.view(labels.shape[0], -1).ne(-100).sum(-1)
        return DynMoeCausalLMOutput(logits=logits, **self._fields(outputs, wanted, loss, counts, **kwargs))

    def _last_real_token(self, shape: torch.Size, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """(B,) position of the last token that is not padding, on either side."""
        batch_size, sequence_length = shape[:2]
        pad = self.config.pad_token_id
        real = real_tokens(attention_mask, batch_size, sequence_length)
        if real is None and input_ids is not None and pad is not None:
            real = input_ids != pad
        if real is None:
            if batch_size > 1 and pad is None:
                raise ValueError("Give an attention_mask, or set pad_token_id in the config, to classify a batch.")
            return torch.full((batch_size,), sequence_length - 1)
        return (torch.arange(sequence_length, device=real.device) * real).argmax(-1)


class DynMoeForTokenClassification(_DynMoeHead):
    """The decoder with a classifier on every token."""

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DynMoeCausalLMOutput:
        """`labels`: (B, S) classes, -100 where a token has none."""
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        outputs, wanted = self._decode(*inputs, has_labels=labels is not None, **kwargs)
        logits = self.score(outputs.last_hidden_state)
        loss = counts = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config)
            counts = labels.ne(-100).sum(-1)
        return DynMoeCausalLMOutput(logits=logits, **self._fields(outputs, wanted, loss, counts, **kwargs))


class DynMoeForQuestionAnswering(_DynMoeHead):
    """The decoder with two scores on every token: an answer starts here, an answer ends here."""

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DynMoeQuestionAnsweringOutput:
        """`start_positions`, `end_positions`: (B,) token positions of the answer."""
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        has_labels = start_positions is not None and end_positions is not None
        outputs, wanted = self._decode(*inputs, has_labels=has_labels, **kwargs)
        start, end = (part.squeeze(-1).contiguous() for part in self.qa_outputs(outputs.last_hidden_state).split(1, -1))
        loss = counts = None
        if has_labels:
            loss = self.loss_function(start, end, start_positions, end_positions)
            counts = torch.ones(start.shape[0], device=start.device)
        return DynMoeQuestionAnsweringOutput(
            start_logits=start, end_logits=end, **self._fields(outputs, wanted, loss, counts, **kwargs)
        )


__all__ = [
    "DynMoeForCausalLM",
    "DynMoeForQuestionAnswering",
    "DynMoeForSequenceClassification",
    "DynMoeForTokenClassification",
    "DynMoeModel",
    "DynMoePreTrainedModel",
]
