"""Small models for tests. `initializer_range` is large enough for the experts to matter in the logits."""

import itertools
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model.expert_selectors import SELECTORS
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.model.scorers import SCORERS

ENGINES = ("reference", "eager", "ragged", "grouped_mm", "batched_mm")

# Options that change what a part does, beyond its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "top_k": [
        {"k": 1, "norm_topk_prob": False},
        {"score_function": "sigmoid", "num_groups": 2, "top_groups": 1, "bias": True, "scale": 2.5},
    ],
    "top_p": [{"p": 0.0}, {"p": 1.0}, {"p": 0.6, "max_experts": 2, "norm_topk_prob": True}],
}


def all_routings() -> dict[str, dict[str, Any]]:
    """Every preset, every combination of registered parts, and every variant, by a readable name."""
    from dynmoe_hf.model.expert_layouts import EXPERTS

    routings: dict[str, dict[str, Any]] = {name: {"method": name} for name in METHODS}
    for scorer, selector, experts in itertools.product(SCORERS, SELECTORS, EXPERTS):
        parts = {"scorer": {"type": scorer}, "selector": {"type": selector}, "experts": {"type": experts}}
        routings[f"{scorer}+{selector}+{experts}"] = parts
    for selector, variants in VARIANTS.items():
        for number, options in enumerate(variants):
            routings[f"{selector}-{number}"] = {"selector": {"type": selector, **options}}
    return routings


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


def tokens(*shape: int, seed: int = 1, vocab_size: int = 97) -> torch.Tensor:
    """Random token ids without the padding token 0."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
