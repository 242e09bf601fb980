"""Checkpoints of other formats, made by transformers' own classes or of recorded weights."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.recorded import Vectors

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
QWEN_MOE: dict[str, Any] = SMALL | ROUTED | {"intermediate_size": 40, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}

MOE_CONFIGS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4, router_aux_loss_coef=0.02),
    "mixtral, window, tied": MixtralConfig(
        **SMALL, intermediate_size=24, num_local_experts=5, sliding_window=4, head_dim=6, tie_word_embeddings=True
    ),
    "olmoe": OlmoeConfig(**SMALL, **ROUTED, intermediate_size=24),
    "olmoe, norm, bias": OlmoeConfig(
        **SMALL, **ROUTED, intermediate_size=24, norm_topk_prob=True, attention_bias=True, rope_parameters=YARN
    ),
    "qwen3_moe": Qwen3MoeConfig(**QWEN_MOE, head_dim=16),
    "qwen3_moe, dense, window, bias": Qwen3MoeConfig(
        **QWEN_MOE,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=4,
    ),
}
IN_ONLY_CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe, step": Qwen3MoeConfig(**QWEN_MOE, decoder_sparse_step=2),
    "qwen2_moe": Qwen2MoeConfig(
        **QWEN_MOE, shared_expert_intermediate_size=20, use_sliding_window=True, sliding_window=4, mlp_only_layers=[0]
    ),
    "qwen2_moe, no bias, tied": Qwen2MoeConfig(
        **QWEN_MOE, shared_expert_intermediate_size=20, qkv_bias=False, norm_topk_prob=True, tie_word_embeddings=True
    ),
}
DENSE_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, intermediate_size=40),
    "llama, bias, tied": LlamaConfig(**SMALL, intermediate_size=40, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, intermediate_size=40, sliding_window=4, head_dim=16),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=40, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=40, head_dim=16, attention_bias=True),
}


def new_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A seeded model whose norms and biases are not those of a fresh one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # saving writes a dtype into the config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def save_official(name: str, folder: Path, changes: dict[str, Any] | None = None) -> Vectors:
    """The recorded weights of an official code as a checkpoint, and what was recorded of it."""
    recorded = Vectors(name)
    save_tensors(folder, recorded.under("weights."), recorded.official | (changes or {}))
    return recorded


def save_tensors(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, sharded or not."""
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Kind of source, changes to its config.json, and why it is refused.
CASES_OF_CONFIG: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"clip_qkv": 5.0}, "clip_qkv=5.0"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quantised"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("mixtral", {"hidden_act": "snake"}, "snake"),
    ("qwen3_moe", {"num_experts_per_tok": 9}, "9"),
    ("mixtral", {"hidden_size": "wide"}, "refused"),
]
