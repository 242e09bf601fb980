"""Small models for tests. `initializer_range` is large enough for the experts to matter in the logits."""

import functools
import itertools
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model import dispatch
from dynmoe_hf.model.methods import METHODS, PARTS

BEFORE_5_23 = version.parse(transformers.__version__) < version.parse("5.23")
NEEDS_COMPILED_GROUPED_MM = pytest.mark.skipif(
    BEFORE_5_23,
    reason="the backward pass of the compiled grouped_mm fails inside transformers before 5.23",
)
ENGINES = (*dispatch.ENGINES, "grouped_mm", "batched_mm")

# Options that change what a part does, beyond its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "top_k": [
        {"k": 1, "norm_topk_prob": False},
        {"score_function": "sigmoid", "num_groups": 2, "top_groups": 1, "bias": True, "scale": 2.5},
    ],
    "top_p": [{"p": 0.0}, {"p": 1.0}, {"p": 0.6, "max_experts": 2, "norm_topk_prob": True}, {"standardize": True}],
    "importance": [
        {"statistic": "row_max_norm", "k_max": 4, "norm_topk_prob": True},
        {"statistic": "row_max_nosink", "scale": 0.7},
        {"statistic": "row_entropy", "k_min": 2},
        {"statistic": "self", "scale": 2.0},
    ],
    "recurrent": [
        {"size": 6, "cell": "rnn", "projector": "shared", "init": "uniform"},
        {"size": 6, "cell": "lstm", "init": "uniform", "logit_residual_alpha": 0.5},
        {"size": 6, "recurrent_state": "none", "logit_residual_alpha": 1.0, "detach_logit_residual": True},
        {"size": 6, "recurrent_state": "detach", "init": "uniform"},
    ],
    "low_rank": [{"rank": 5, "intermediate_size": 11, "down_init_std": 0.5}],
    "cartesian": [
        {"composition": "prenorm_input_residual"},
        {"composition": "nested"},
        {"composition": "postnorm"},
        {"composition": "postnorm_input_residual", "second_selector": {"k": 1, "norm_topk_prob": False}},
        {"bank": {"type": "low_rank"}},
    ],
}

# Combinations whose parts need each other.
TOGETHER: dict[str, dict[str, Any]] = {
    "activation_norm in cartesian banks": {
        "scorer": "activation_norm",
        "experts": {"type": "cartesian", "bank": {"type": "low_rank"}},
    },
    "learned importance": {"selector": {"type": "importance", "statistic": "learned"}, "losses": {"importance": 0.01}},
    "budget of each layer": {"method": "dtop_p", "controller": {"scope": "layer", "target": 3.5}},
    "budget of pairs": {"method": "dtop_p", "experts": "cartesian", "controller": {"target": 6}},
}


def combinations() -> dict[str, dict[str, Any]]:
    """Every combination of registered parts, those that the config refuses included."""
    return {
        "+".join(types): {axis: {"type": type_} for axis, type_ in zip(PARTS, types, strict=True)}
        for types in itertools.product(*PARTS.values())
    }


def refusal(routing: Any) -> str | None:
    """Why the config refuses a routing, None if it takes it."""
    try:
        tiny_config(routing)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def all_routings() -> dict[str, dict[str, Any]]:
    """Every preset, every combination of registered parts that works, and every variant, by a readable name."""
    routings: dict[str, dict[str, Any]] = {name: {"method": name} for name in METHODS}
    routings |= {name: parts for name, parts in combinations().items() if refusal(parts) is None}
    for part, variants in VARIANTS.items():
        (axis,) = (axis for axis, table in PARTS.items() if part in table)
        for number, options in enumerate(variants):
            routings[f"{part}-{number}"] = {axis: {"type": part, **options}}
    return routings | TOGETHER


def tiny_config(routing: Any = None, **changes: Any) -> DynMoeConfig:
    """Three layers, one of them dense, one with its own width of everything small."""
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_shared_experts": 1,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "routing": routing,
    }
    return DynMoeConfig(**(settings | changes))


def tiny_model(
    routing: Any = None, engine: str = "eager", seed: int = 0, config: DynMoeConfig | None = None, **changes: Any
) -> DynMoeForCausalLM:
    """A seeded language model in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(routing, **changes) if config is None else config
    return AutoModelForCausalLM.from_config(config, experts_implementation=engine).eval()


def greedy(model: DynMoeForCausalLM, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The prompt (B, S) and its most probable continuation, by full forward passes without a cache."""
    for _ in range(num_tokens):
        prompt = torch.cat([prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


def tokens(*shape: int, seed: int = 1, vocab_size: int = 97) -> torch.Tensor:
    """Random token ids without the padding token 0."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
