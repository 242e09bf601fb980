# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""DynMoeConfig. No `from __future__ import annotations` here: it would switch off the type checks of `@strict`."""

import dataclasses
import difflib
from math import isfinite
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .compat import ROPE_INIT_FUNCTIONS
from .methods import METHODS, RoutingSpec, check, default_slots, expand, with_own_slots
from .parallel_plans import expert_parallel_plan, tensor_parallel_plan
from .routing import MAX_FACTOR, MAX_WIDTH, shown, unknown_name

# No real model comes near these. They keep a config that somebody else wrote from asking for more memory or time than
# any machine has, and the elements of each tensor below 2**63.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "moe_intermediate_size": MAX_WIDTH,
    "num_hidden_layers": 2**11,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31 - 1,
    "num_experts": 2**18,
    "sliding_window": 2**31 - 1,
    "shared_expert_intermediate_size": MAX_WIDTH,
}
MAX_PARAMETERS = 10**14
MAX_LABELS = 2**20
MAX_DEPTH = 50  # of dicts and lists in a stored config
RANGES = (
    ("initializer_range", 0, 10),
    ("rms_norm_eps", 1e-12, 10),  # below, the gradient of a row of zeros is not finite in float32
    ("attention_dropout", 0, 1),
    ("expert_dropout", 0, 1),
    ("num_shared_experts", 0, 2**10),
    ("routed_expert_weight", -MAX_FACTOR, MAX_FACTOR),
    ("shared_expert_weight", -MAX_FACTOR, MAX_FACTOR),
)
# Fields whose default a method may set (`Method.fields`), with what holds for the others.
METHOD_FIELDS = {
    "num_shared_experts": 0,
    "routed_expert_weight": 1.0,
    "shared_expert_weight": 1.0,
    "balance_normalize": False,
}


@strict
class DynMoeConfig(PreTrainedConfig):
    """Configuration of a decoder whose FFN blocks are mixture-of-experts layers with selectable routing.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: D.
        intermediate_size: width of the FFN in dense layers.
        moe_intermediate_size: I, width of one expert.
        num_hidden_layers: decoder layers.
        num_attention_heads, num_key_value_heads, head_dim: attention; key-value heads default to the heads, the head
            dimension to `hidden_size / num_attention_heads`.
        hidden_act: activation of the gate, a name in transformers' `ACT2FN`.
        max_position_embeddings: longest sequence.
        initializer_range: standard deviation of all matrices at the start.
        rms_norm_eps, attention_bias, attention_dropout, tie_word_embeddings, use_cache: as in Llama.
        rope_parameters: any rope type of transformers, e.g. `{"rope_type": "default", "rope_theta": 10000.0}`.
        qk_norm: RMSNorm on queries and keys: `none`, `per_head` (Qwen3), or `full` width (OLMoE).
        sliding_window: tokens each token may attend to, itself included; None for all before it.
        layer_types: `full_attention` or `sliding_attention` for each layer; by default all slide if there is a window.
        num_experts: E, routed experts of each MoE layer; in a `cartesian` layer, sub-experts of each bank.
        num_experts_per_tok: k of `top_k`, and the cap of selectors that choose the number themselves. None gives 2 to
            `top_k` and no cap (E) to the others.
        num_shared_experts: experts that every token uses; together one FFN of this many times `moe_intermediate_size`.
            None gives 1 to the `cartesian` methods, which have one in each bank, and 0 to the others.
        shared_expert_intermediate_size: width of that FFN; None for this many times `moe_intermediate_size`.
        routed_expert_weight, shared_expert_weight: what the routed and the shared part are multiplied with before they
            are added, where there are shared experts. None gives 0.5 to `rmoe` and 1 to the others.
        shared_expert_gate: also multiply the shared part of each token with the sigmoid of a learned score (Qwen2-MoE).
        moe_output_bias: add a bias (D,) to what the routed experts of a layer return.
        expert_dropout: share of the inner activations of routed experts that training drops (Switch, arXiv 2101.03961,
            section 2.4).
        mlp_layer_types: `sparse` or `dense` for each layer; None makes every layer sparse.
        routing: a method name, or a dict that changes its parts (see methods.py); stored in expanded form.
        layer_routing: layer index -> changes to `routing` for that layer alone.
        router_dtype: `float32`, or `model` to select in the dtype of the hidden states, as some released codes do.
        aux_reduction: how auxiliary losses are reduced over layers: `mean`, `sum`, or `pooled` (see losses.py).
        balance_scope: tokens that the load balance averages over before it multiplies: one `sequence`; all tokens of
            one forward call (`micro`, the papers' form), which depends on how a batch is cut; or all tokens of the
            optimizer step (`global`), which needs `dynmoe_hf.training.balance` where a step has several calls.
        balance_normalize: divide usage by the mean number of experts, so that perfect balance costs 1. None does so for
            the `importance` methods only.
        output_router_logits: return the router logits of every layer, and the load-balance loss as `aux_loss`.

    Raises:
        ValueError: on an unknown name, an impossible value or an impossible combination.
    """

    model_type = "dynmoe"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "router_logits",
        "routing",
        "experts_per_token",
        "expert_usage",
        "lm_loss",
        "aux_loss",
        "aux_losses",
    ]
    attribute_map = {"num_local_experts": "num_experts"}

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    moe_intermediate_size: int = 704
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    qk_norm: Literal["none", "per_head", "full"] = "none"
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    num_experts: int = 8
    num_experts_per_tok: int | None = None
    num_shared_experts: int | None = None
    shared_expert_intermediate_size: int | None = None
    routed_expert_weight: float | int | None = None
    shared_expert_weight: float | int | None = None
    shared_expert_gate: bool = False
    moe_output_bias: bool = False
    expert_dropout: float | int = 0.0
    mlp_layer_types: list[str] | None = None
    routing: str | dict | None = None
    layer_routing: dict | None = None
    router_dtype: Literal["float32", "model"] = "float32"
    aux_reduction: Literal["mean", "sum", "pooled"] = "mean"
    balance_scope: Literal["sequence", "micro", "global"] = "sequence"
    balance_normalize: bool | None = None
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        _refuse_misspelt(self, kwargs)
        _check_inherited(self, kwargs)
        self._check_sizes()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}; give head_dim to choose the size of a head yourself."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.routing = expand(self.routing)
        method = METHODS.get(self.routing["method"])
        for name, default in METHOD_FIELDS.items():
            if getattr(self, name) is None:
                setattr(self, name, method.fields.get(name, default) if method else default)
        if self.num_experts_per_tok is None:
            self.num_experts_per_tok = default_slots(self.routing, self.num_experts)
        self.layer_routing = {_layer_number(key): changes for key, changes in (self.layer_routing or {}).items()}
        self._check_layers("mlp_layer_types", ("sparse", "dense"))  # what the plan for tied embeddings is made of
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but `routing` changes the stored one (see `change_routing`) instead of replacing it.

        Raises:
            ValueError: also for a stored choice of engine: that of an attention kernel would download its code.
        """
        _refuse_stored(config_dict)
        changes = kwargs.pop("routing", None)
        keep_slots = "num_experts_per_tok" in kwargs
        loaded = super().from_dict(config_dict, **kwargs)
        if changes is not None:
            config = loaded[0] if isinstance(loaded, tuple) else loaded
            config.change_routing(changes, keep_slots=keep_slots)
        return loaded

    def change_routing(
        self, changes: str | dict[str, Any], layers: list[int] | None = None, keep_slots: bool = False
    ) -> None:
        """Change the routing of this config in place, or not at all.

        Args:
            changes: a method name, or a dict of changes to the present routing.
            layers: change only these layers; None changes the model's routing, which layers with a `layer_routing` of
                their own keep overriding.
            keep_slots: keep `num_experts_per_tok` even if the selector becomes another one. Otherwise it then returns
                to the new selector's default, because k of one is no cap for the other.

        Raises:
            ValueError: when the change is refused; the config is then as it was.
        """
        before = (self.routing, self.layer_routing, self.num_experts_per_tok)
        if layers is not None:
            changed = {layer: _change(self.routing_for(layer), changes) for layer in layers}
            self.layer_routing = {**(self.layer_routing or {}), **changed}
        else:
            old = expand(self.routing)
            self.routing = _change(old, changes)
            if self.routing["selector"]["type"] != old["selector"]["type"] and not keep_slots:
                self.num_experts_per_tok = default_slots(self.routing, self.num_experts)
        try:
            self.check()
        except ValueError:
            self.routing, self.layer_routing, self.num_experts_per_tok = before
            raise

    def routing_for(self, layer_idx: int) -> RoutingSpec:
        """The full routing specification of one layer."""
        base = expand(self.routing)
        changes = (self.layer_routing or {}).get(layer_idx)
        return base if changes is None else with_own_slots(expand(changes, base), base, self.num_experts)

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether the FFN of this layer is a mixture of experts."""
        return self.mlp_layer_types is None or self.mlp_layer_types[layer_idx] == "sparse"

    def window_for(self, layer_idx: int) -> int | None:
        """Sliding window of this layer's attention in tokens, None for full attention."""
        return self.sliding_window if self.layer_types[layer_idx] == "sliding_attention" else None

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """What tensor parallelism divides, see `tensor_parallel_plan`."""
        return tensor_parallel_plan(self)

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        # transformers before 5.23 sets it again, with the division of tied embeddings that it has already.
        if plan != self.base_model_tp_plan:
            raise ValueError("'base_model_tp_plan' is no configuration field: the plan follows from the layers.")

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """What expert parallelism divides, see `expert_parallel_plan`."""
        return expert_parallel_plan(self)

    @property
    def router_aux_loss_coef(self) -> float:
        """The load-balance coefficient under the name that vLLM and TRL read."""
        return expand(self.routing)["losses"]["load_balance"]

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        self.routing = expand({"losses": {"load_balance": value}}, expand(self.routing))

    def check(self) -> None:
        """Refuse impossible values and combinations; called when a config, and again when a model, is built.

        Before that, `layer_types` of a single kind are brought to the present number of layers.

        Raises:
            ValueError: naming the field and the reason.
        """
        self._check_sizes()
        if len(set(self.layer_types)) == 1:
            # One kind for all: a changed number of layers, as for a truncated model, needs no new list.
            self.layer_types = self.layer_types[:1] * self.num_hidden_layers
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads="
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}.")
        if self.hidden_act not in ACT2FN:
            raise ValueError(unknown_name("hidden_act", self.hidden_act, ACT2FN))
        for name, lowest, highest in RANGES:
            if not lowest <= getattr(self, name) < highest:
                raise ValueError(f"{name} must be at least {lowest} and below {highest}, got {getattr(self, name)}.")
        if self.shared_expert_gate and not self.num_shared_experts:
            raise ValueError("shared_expert_gate needs shared experts: give num_shared_experts.")
        self._check_total()
        self._check_rope()
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id={self.pad_token_id} is outside the vocabulary of {self.vocab_size} tokens.")
        self._check_layers("mlp_layer_types", ("sparse", "dense"))
        self._check_layers("layer_types", ("full_attention", "sliding_attention"))
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has a sliding_attention layer, but sliding_window is not set.")
        for layer in self.layer_routing or {}:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(f"layer_routing names layer {layer}, but there are {self.num_hidden_layers} layers.")
            if not self.is_sparse(layer):
                raise ValueError(f"layer_routing names layer {layer}, which mlp_layer_types makes dense.")
        specs = [self.routing_for(layer) for layer in range(self.num_hidden_layers) if self.is_sparse(layer)]
        for spec in specs:
            check(spec, self)
        for axis, type_name, shared in (("scorer", "recurrent", "cell"), ("controller", "budget", "controller")):
            options = [spec[axis] for spec in specs if spec[axis]["type"] == type_name]
            if any(other != options[0] for other in options):
                raise ValueError(
                    f"All layers with a {type_name} {axis} share one {shared}: give them the same options."
                )

    def _check_sizes(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= largest:
                bound = "at least 1" if value < 1 else f"at most {largest:,}"
                raise ValueError(f"{name} must be {bound}, got {shown(value)}.")

    def _check_total(self) -> None:
        """Refuse sizes whose product is absurd, by the matrices that every routing has."""
        width = self.moe_intermediate_size
        shared = self.shared_expert_intermediate_size or self.num_shared_experts * width
        ffn = 3 * max(self.num_experts * width + shared, self.intermediate_size)
        attention = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        total = self.hidden_size * (self.vocab_size + self.num_hidden_layers * (attention + ffn))
        if total > MAX_PARAMETERS:
            raise ValueError(
                f"hidden_size, num_hidden_layers, num_experts and the other sizes make about {total:.1e} parameters, "
                f"and more than {MAX_PARAMETERS:.0e} are refused."
            )

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        kind, theta = rope.get("rope_type"), rope.get("rope_theta")
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1e-6 <= theta <= 1e30:
            raise ValueError(f"rope_parameters: rope_theta must be between 1e-6 and 1e30, got {shown(theta)}.")
        if kind != "default" and (not isinstance(kind, str) or kind not in ROPE_INIT_FUNCTIONS):
            raise ValueError(unknown_name("rope_type", kind, ["default", *ROPE_INIT_FUNCTIONS]))
        if kind == "default":
            return
        try:
            with torch.device("cpu"):  # a model may be being built on the meta device, which has no values
                frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](self)
            usable = frequencies.shape == (self.head_dim // 2,) and frequencies.isfinite().all() and isfinite(scaling)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
            reason = shown(" ".join(str(error).split()))
            raise ValueError(
                f"rope_parameters of type {kind!r} are incomplete or of the wrong kind: {reason}."
            ) from error
        if not usable:
            raise ValueError(f"rope_parameters of type {kind!r} do not give {self.head_dim // 2} finite frequencies.")

    def _check_layers(self, name: str, accepted: tuple[str, ...]) -> None:
        values = getattr(self, name)
        if values is None:
            return
        if len(values) != self.num_hidden_layers:
            raise ValueError(f"{name} has {len(values)} entries for {self.num_hidden_layers} layers.")
        for value in values:
            if value not in accepted:
                raise ValueError(f"{name} accepts {' and '.join(accepted)}, got {value!r}.")


def _change(spec: RoutingSpec, changes: str | dict[str, Any]) -> RoutingSpec:
    """A specification after some changes.

    Raises:
        ValueError: for a threshold that a controller would move on from, beside what `expand` refuses.
    """
    changed = expand(changes, spec)
    if changed["controller"]["type"] == spec["controller"]["type"] == "budget":
        if changed["selector"].get("p") != spec["selector"].get("p"):
            raise ValueError(
                "The controller moves the threshold p: to set it yourself, change controller to 'none' together with p."
            )
    return changed


def _layer_number(key: Any) -> int:
    if isinstance(key, str) and key.isdecimal():
        return int(key)
    if isinstance(key, bool) or not isinstance(key, int):
        raise ValueError(f"layer_routing must have layer numbers as keys, got {shown(key)}.")
    return key


def _refuse_misspelt(config: PreTrainedConfig, extra: dict[str, Any]) -> None:
    """transformers keeps unknown keyword arguments as attributes; one that resembles a field which is not given is a
    typing mistake, and one with the name of a method would hide it."""
    fields = [
        field.name
        for field in dataclasses.fields(config)
        if not field.name.endswith("_token_id") and getattr(config, field.name) == field.default
    ]
    for name in set(extra) - {"rope_theta", "rope_scaling", "model_type"}:
        attribute = getattr(type(config), name, None)
        if hasattr(type(config), name):
            if not isinstance(attribute, property) or attribute.fset is None:
                raise ValueError(f"{name!r} is no configuration field but the name of a method or class attribute.")
            continue
        if close := difflib.get_close_matches(name[:100], fields, n=1, cutoff=0.8):
            raise ValueError(f"Unknown configuration field {shown(name)}. Did you mean {close[0]!r}?")


# What transformers' own configuration adds to ours. It takes any value, because its annotations are strings, which
# `@strict` does not check, and stumbles over a wrong one later.
INHERITED = {
    "transformers_version": str,
    "architectures": list,
    "output_hidden_states": bool,
    "output_attentions": bool,
    "return_dict": bool,
    "chunk_size_feed_forward": int,
    "is_encoder_decoder": bool,
    "id2label": dict,
    "label2id": dict,
    "num_labels": int,
    "problem_type": str,
    "rope_scaling": dict,
    "auto_map": dict,
    "quantization_config": dict,
    "tokenizer_class": str,
    "model_type": str,
    "attn_implementation": (str, dict),
    "_attn_implementation": (str, dict),
    "experts_implementation": (str, dict),
    "_experts_implementation": (str, dict),
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def _check_inherited(config: PreTrainedConfig, extra: dict[str, Any]) -> None:
    """Refuse impossible values of inherited fields, before transformers reads them."""
    for name, kind in INHERITED.items():
        value = extra[name] if name in extra else vars(config).get(name)
        if name == "quantization_config" and hasattr(value, "to_dict"):
            continue
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is of the wrong type: {shown(value)}.")
    if config.problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(unknown_name("problem_type", config.problem_type, PROBLEM_TYPES))
    if extra.get("auto_map", {}) is None:
        extra.pop("auto_map")
    if extra.get("per_layer_config"):
        raise ValueError("per_layer_config is not supported: layer_routing changes the routing of single layers.")
    extra.pop("per_layer_config", None)
    if extra.get("num_labels", 1) is None:
        extra.pop("num_labels")
    if not 1 <= extra.get("num_labels", 1) <= MAX_LABELS:
        raise ValueError(f"num_labels must be between 1 and {MAX_LABELS:,}, got {shown(extra['num_labels'])}.")
    for key in config.id2label or {}:
        if not str(key).isdecimal():
            raise ValueError(f"id2label must have label numbers as keys, got {shown(key)}.")
    for name, dtype in (("dtype", config.dtype), ("torch_dtype", extra.get("torch_dtype"))):
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise ValueError(f"{name} must be the name of a floating-point dtype of torch, got {shown(dtype)}.")


def _refuse_stored(stored: dict[str, Any]) -> None:
    """Refuse what no saved config of this family holds: a choice of engine or file, or lists in lists without end."""
    for name, value in stored.items():
        if ("_implementation" in name or name == "transformers_weights") and value is not None:
            raise ValueError(f"A stored configuration must not have {name}: that is for who loads it to choose.")
    level: list[Any] = [stored]
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in (value.values() if isinstance(value, dict) else value)]
        level = [child for child in level if isinstance(child, dict | list)]
    if level:
        raise ValueError(f"The configuration is nested more than {MAX_DEPTH} deep.")


__all__ = ["DynMoeConfig"]
