"""The configurations of the formats: what `DynMoeConfig` says of them, what it cannot say, and the way back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from dynmoe_hf.model import DynMoeConfig
from dynmoe_hf.model.methods import expand

Arguments = tuple[dict[str, Any], list[str]]

SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
# What every config.json may hold beside the fields of the model.
NOT_THE_MODEL = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "head_dim",
    "id2label",
    "label2id",
    "model_type",
    "num_experts",
    "num_local_experts",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
    "transformers_version",
}
# One loss over the tokens of all layers together, as in transformers and in the code of RMoE.
POOLED = {"aux_reduction": "pooled", "balance_scope": "micro"}
ONLY_IN_TRAINING = "it matters in training only"


def unknown_fields(config: PreTrainedConfig, stored: Mapping[str, Any]) -> list[str]:
    """A note on the fields of a config.json that the configuration class of its format does not have."""
    known = {field.name for field in dataclasses.fields(config)} | NOT_THE_MODEL
    names = sorted(name for name, value in stored.items() if name not in known and value is not None)
    return [f"unknown fields of config.json are left out: {', '.join(names)}"] if names else []


def read_mixtral(config: MixtralConfig) -> Arguments:
    """Arguments of `DynMoeConfig` for a Mixtral, and notes."""
    arguments = {
        **_decoder(config),
        **_top_k(config, norm_topk_prob=True),
        "head_dim": config.head_dim,
        "moe_intermediate_size": config.intermediate_size,
        "sliding_window": config.sliding_window,
    }
    notes = []
    if config.router_jitter_noise:
        notes.append(f"router_jitter_noise={config.router_jitter_noise} is left out: {ONLY_IN_TRAINING}")
    return arguments, notes


def read_olmoe(config: OlmoeConfig) -> Arguments:
    """Arguments of `DynMoeConfig` for an OLMoE.

    Raises:
        ValueError: queries, keys and values are clipped.
    """
    if config.clip_qkv is not None:
        raise ValueError(f"clip_qkv={config.clip_qkv}: DynMoeConfig cannot clip queries, keys and values.")
    return {
        **_decoder(config),
        **_top_k(config, config.norm_topk_prob),
        "moe_intermediate_size": config.intermediate_size,
        "attention_bias": config.attention_bias,
        "qk_norm": "full",
    }, []


def read_qwen3_moe(config: Qwen3MoeConfig) -> Arguments:
    """Arguments of `DynMoeConfig` for a Qwen3-MoE."""
    return {
        **_decoder(config),
        **_top_k(config, config.norm_topk_prob),
        "head_dim": getattr(config, "head_dim", None),
        "moe_intermediate_size": config.moe_intermediate_size,
        "attention_bias": config.attention_bias,
        "qk_norm": "per_head",
        "sliding_window": config.sliding_window,
        "mlp_layer_types": _layer_types(config),
    }, []


def read_qwen2_moe(config: Qwen2MoeConfig) -> Arguments:
    """Arguments of `DynMoeConfig` for a Qwen2-MoE."""
    return {
        **_decoder(config),
        **_top_k(config, config.norm_topk_prob),
        **_windows(config),
        "moe_intermediate_size": config.moe_intermediate_size,
        "attention_bias": config.qkv_bias,
        "mlp_layer_types": _layer_types(config),
        "num_shared_experts": 1,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "shared_expert_gate": True,
    }, []


def read_llama(config: LlamaConfig) -> Arguments:
    """Arguments of `DynMoeConfig` for a Llama, every layer dense.

    Raises:
        ValueError: the FFN has biases.
    """
    if config.mlp_bias:
        raise ValueError("mlp_bias=True: the FFN and the experts of DynMoeConfig have no biases.")
    return {**_dense(config), "head_dim": config.head_dim, "attention_bias": config.attention_bias}, []


def read_mistral(config: MistralConfig) -> Arguments:
    """Arguments of `DynMoeConfig` for a Mistral, every layer dense."""
    return {**_dense(config), "head_dim": config.head_dim, "sliding_window": config.sliding_window}, []


def read_qwen2(config: Qwen2Config) -> Arguments:
    """Arguments of `DynMoeConfig` for a Qwen2, every layer dense."""
    return {**_dense(config), **_windows(config), "attention_bias": True}, []


def read_qwen3(config: Qwen3Config) -> Arguments:
    """Arguments of `DynMoeConfig` for a Qwen3, every layer dense."""
    return {
        **_dense(config),
        **_windows(config),
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "qk_norm": "per_head",
    }, []


def read_dynamic_moe(config: Mapping[str, Any]) -> Arguments:
    """Arguments of `DynMoeConfig` for the config.json of Dynamic_MoE, whose defaults are those of its class.

    Its attention knows neither grouped heads nor another base of the rotary positions than 10,000.
    """
    frequency = config.get("expert_frequency", 2)
    num_layers = config["num_hidden_layers"]
    arguments = {
        **_official(config),
        "num_key_value_heads": config["num_attention_heads"],
        "num_experts": config["num_experts"],
        "moe_intermediate_size": config["intermediate_size"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "mlp_layer_types": ["dense" if layer % frequency else "sparse" for layer in range(num_layers)],
        "routing": {"method": "top_p", "selector": {"p": config.get("top_p_threshold", 0.4)}},
        "balance_scope": "micro",
    }
    ignored = {
        "num_key_value_heads": (None, config["num_attention_heads"]),
        "rope_theta": (None, 10000.0),
        "rope_scaling": (None,),
        "experts_topk": (None,),
    }
    return arguments, [
        f"{name}={config[name]!r} is left out: the released code stores it and does not use it"
        for name, silent in ignored.items()
        if config.get(name) not in silent
    ]


def read_rmoe(config: Mapping[str, Any]) -> Arguments:
    """Arguments of `DynMoeConfig` for the config.json of RMoE's `llama_moe_rnn`.

    Raises:
        ValueError: positions are scaled, which no recorded model shows.
    """
    if config.get("rope_scaling"):
        raise ValueError("rope_scaling of RMoE's code is not supported.")
    scorer: dict[str, Any] = {"type": "linear"}
    if (cell := config.get("moe_router_type")) in ("gru", "rnn"):
        scorer = {"type": "recurrent", "size": config["moe_router_rnn_hidden_size"], "cell": cell}
    num_layers = config["num_hidden_layers"]
    num_sparse = min(config.get("moe_num_layers", num_layers), num_layers)
    return {
        **_official(config),
        "num_key_value_heads": config.get("num_key_value_heads"),
        "num_experts": config["num_local_experts"],
        "num_experts_per_tok": config["num_experts_per_tok"],
        "moe_intermediate_size": config.get("moe_expert_intermediate_size") or config["intermediate_size"],
        "num_shared_experts": int(config.get("add_moe_share_expert", False)),
        "shared_expert_intermediate_size": config.get("moe_share_expert_intermediate_size"),
        "routed_expert_weight": config.get("moe_weight", 0.5),
        "shared_expert_weight": config.get("share_weight", 0.5),
        "moe_output_bias": config.get("add_moe_bias", False),
        "mlp_layer_types": ["dense"] * (num_layers - num_sparse) + ["sparse"] * num_sparse,
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.get("rope_theta", 10000.0))},
        "routing": {"scorer": scorer, "losses": {"load_balance": config.get("router_aux_loss_coef", 0.001)}},
        **POOLED,
    }, []


def write_mixtral(config: DynMoeConfig) -> tuple[MixtralConfig, list[str]]:
    """The Mixtral that computes what this configuration says, and notes.

    Raises:
        ValueError: with every reason why none does.
    """
    reasons = _top_k_reasons(config)
    if not expand(config.routing)["selector"].get("norm_topk_prob", True):
        reasons.append("norm_topk_prob=False: Mixtral always divides the weights by their sum")
    if config.qk_norm != "none":
        reasons.append(f"qk_norm={config.qk_norm!r}: Mixtral has no norms on queries and keys")
    if config.attention_bias:
        reasons.append("attention_bias=True: Mixtral has no biases")
    reasons += _sparse_reasons(config, "Mixtral") + _window_reasons(config, "Mixtral")
    _refuse("mixtral", reasons)
    return MixtralConfig(
        **_decoder(config) | {"intermediate_size": config.moe_intermediate_size},
        **_experts_out(config),
        head_dim=config.head_dim if _is_odd_head(config) else None,
        num_local_experts=config.num_experts,
        sliding_window=config.sliding_window,
    ), _training_notes(config)


def write_olmoe(config: DynMoeConfig) -> tuple[OlmoeConfig, list[str]]:
    """The OLMoE that computes what this configuration says, and notes.

    Raises:
        ValueError: with every reason why none does.
    """
    reasons = _top_k_reasons(config) + _sparse_reasons(config, "OLMoE")
    if config.qk_norm != "full":
        reasons.append(f"qk_norm={config.qk_norm!r}: OLMoE always has norms on whole queries and keys")
    if config.sliding_window is not None:
        reasons.append(f"sliding_window={config.sliding_window}: OLMoE attends to all tokens")
    if _is_odd_head(config):
        reasons.append(f"head_dim={config.head_dim}: in OLMoE it is hidden_size / num_attention_heads")
    _refuse("olmoe", reasons)
    return OlmoeConfig(
        **_decoder(config) | {"intermediate_size": config.moe_intermediate_size},
        **_experts_out(config),
        num_experts=config.num_experts,
        norm_topk_prob=expand(config.routing)["selector"]["norm_topk_prob"],
        attention_bias=config.attention_bias,
    ), _training_notes(config)


def write_qwen3_moe(config: DynMoeConfig) -> tuple[Qwen3MoeConfig, list[str]]:
    """The Qwen3-MoE that computes what this configuration says, and notes.

    Raises:
        ValueError: with every reason why none does.
    """
    reasons = _top_k_reasons(config) + _window_reasons(config, "Qwen3-MoE")
    if config.qk_norm != "per_head":
        reasons.append(f"qk_norm={config.qk_norm!r}: Qwen3-MoE always has norms on single heads")
    _refuse("qwen3_moe", reasons)
    dense = [layer for layer in range(config.num_hidden_layers) if not config.is_sparse(layer)]
    return Qwen3MoeConfig(
        **_decoder(config),
        **_experts_out(config),
        moe_intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        norm_topk_prob=expand(config.routing)["selector"]["norm_topk_prob"],
        attention_bias=config.attention_bias,
        mlp_only_layers=dense,
        sliding_window=config.sliding_window,
        use_sliding_window=config.sliding_window is not None,
        **({"head_dim": config.head_dim} if _is_odd_head(config) else {}),
    ), _training_notes(config)


def _decoder(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields that have one name everywhere. Raises ValueError for rotary positions on a part of each head."""
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor: DynMoeConfig turns whole heads.")
    fields = {name: getattr(config, name) for name in SAME_NAME}
    return {**fields, "intermediate_size": config.intermediate_size, "rope_parameters": dict(config.rope_parameters)}


def _dense(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a dense model. The experts that it does not have are one of the width of its FFN."""
    return {
        **_decoder(config),
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": 1,
        "num_experts_per_tok": 1,
        "mlp_layer_types": ["dense"] * config.num_hidden_layers,
    }


def _top_k(config: PreTrainedConfig, norm_topk_prob: bool) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": config.output_router_logits,
        "routing": {
            "method": "top_k",
            "selector": {"norm_topk_prob": norm_topk_prob},
            "losses": {"load_balance": config.router_aux_loss_coef},
        },
        **POOLED,
    }


def _layer_types(config: Qwen2MoeConfig | Qwen3MoeConfig) -> list[str]:
    only, step = config.mlp_only_layers, config.decoder_sparse_step
    return ["dense" if layer in only or (layer + 1) % step else "sparse" for layer in range(config.num_hidden_layers)]


def _windows(config: Qwen2Config | Qwen2MoeConfig | Qwen3Config) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window or None, "layer_types": list(config.layer_types)}


def _official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the official codes, both written after the Llama of their time, whose defaults hold."""
    defaults = {
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    fields = {name: config.get(name, value) for name, value in defaults.items()}
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return fields | {name: config[name] for name in needed}


def _is_odd_head(config: DynMoeConfig) -> bool:
    return config.head_dim * config.num_attention_heads != config.hidden_size


def _experts_out(config: DynMoeConfig) -> dict[str, Any]:
    k = expand(config.routing)["selector"]["k"]
    return {
        "num_experts_per_tok": config.num_experts_per_tok if k is None else k,
        "output_router_logits": config.output_router_logits,
        "router_aux_loss_coef": config.router_aux_loss_coef,
    }


def _top_k_reasons(config: DynMoeConfig) -> list[str]:
    """Why no model with plain top-k routing computes what this configuration says."""
    reasons = []
    sparse = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    if not sparse:
        reasons.append("no layer has experts")
    specs = [config.routing_for(layer) for layer in sparse]
    if any(_compared(spec) != _compared(specs[0]) for spec in specs):
        reasons.append("layer_routing: all layers of the format choose in the same way")
    spec = specs[0] if specs else expand(config.routing)
    for axis, plain in (("scorer", "linear"), ("selector", "top_k"), ("experts", "swiglu"), ("controller", "none")):
        if spec[axis]["type"] != plain:
            reasons.append(f"{axis} {spec[axis]['type']!r}: the format has only {plain!r}")
    if spec["selector"]["type"] == "top_k":
        plain = {"score_function": "softmax", "scale": 1, "num_groups": 1, "bias": False, "disable_top1": False}
        reasons += [
            f"selector {name}={spec['selector'][name]!r}: in the format it is {value!r}"
            for name, value in plain.items()
            if spec["selector"][name] != value
        ]
    if config.num_shared_experts:
        reasons.append("num_shared_experts: the format has no shared experts")
    if config.moe_output_bias:
        reasons.append("moe_output_bias: the format has no bias there")
    return reasons


def _compared(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {axis: part for axis, part in spec.items() if axis not in ("losses", "method")}


def _sparse_reasons(config: DynMoeConfig, name: str) -> list[str]:
    if all(config.is_sparse(layer) for layer in range(config.num_hidden_layers)):
        return []
    return [f"mlp_layer_types: every layer of {name} has experts"]


def _window_reasons(config: DynMoeConfig, name: str) -> list[str]:
    wanted = "full_attention" if config.sliding_window is None else "sliding_attention"
    if set(config.layer_types) == {wanted}:
        return []
    return [f"layer_types: in {name} all layers have the sliding window, or none"]


def _refuse(name: str, reasons: Sequence[str]) -> None:
    if reasons:
        raise ValueError(f"the format {name!r} cannot say what this model computes: {'; '.join(reasons)}.")


def _training_notes(config: DynMoeConfig) -> list[str]:
    """What the formats do not say of training."""
    notes = []
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_sparse(layer)]
    losses = [config.routing_for(layer)["losses"] for layer in layers]
    if any(value for loss in losses for name, value in loss.items() if name != "load_balance"):
        notes.append(f"losses beside load_balance are left out: {ONLY_IN_TRAINING}")
    if any(loss != losses[0] for loss in losses):
        notes.append(f"coefficients of single layers are left out: {ONLY_IN_TRAINING}")
    if {name: getattr(config, name) for name in POOLED} != POOLED or config.balance_normalize:
        notes.append(
            "the load balance of the format is pooled over layers and tokens, not "
            f"aux_reduction={config.aux_reduction!r}, balance_scope={config.balance_scope!r}"
        )
    if config.router_dtype == "model":
        notes.append("router_dtype='model' is left out: the format computes the softmax in float32")
    return notes
