"""What a configuration costs: parameters, active parameters, memory and FLOPs, without building its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, DynMoeDecoderLayer, DynMoeForCausalLM

PARTS = ("embedding", "attention", "router", "experts", "shared_experts", "dense", "norms", "head")


@dataclass(frozen=True)
class Activity:
    """What one token costs at a given number of experts.

    Args:
        experts_per_token: mean over the MoE layers.
        parameters: parameters that take part in the forward pass of the token.
        flops: floating-point operations of that pass.
    """

    experts_per_token: float
    parameters: int
    flops: int


@dataclass(frozen=True)
class Cost:
    """The cost of a configuration; `count_cost` has the counting rules.

    Args:
        parameters: number of parameters of each of `PARTS`.
        dtype: of the weights.
        weight_bytes: memory of the weights and of the buffers that are saved with them.
        sequence_length: tokens that attention is counted for.
        activity: cost of one token, for a rising number of experts.
    """

    parameters: dict[str, int]
    dtype: str
    weight_bytes: int
    sequence_length: int
    activity: tuple[Activity, ...]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def count_cost(
    config: DynMoeConfig, experts_per_token: float | None = None, sequence_length: int | None = None
) -> Cost:
    """Count parameters, memory and FLOPs of the language model of a configuration, on the meta device.

    Counting rules:

    * a parameter that is shared counts once, so a tied head has none of its own;
    * active parameters are all parameters but those of the experts that a token does not use. Embedding and head count
      in full, as in the papers that publish such figures;
    * FLOPs are those of matrix products in one forward pass, a multiply-add being two: projections, router, experts,
      head, and attention, whose scores and weighted sum each take 2 x heads x head_dim for every key. A token counts
      `sequence_length` keys, or the sliding window if that is shorter: what a kernel computes that masks the future
      rather than skipping it (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Norms, activations, softmax,
      selection and the embedding look-up are left out.

    Args:
        config: a valid configuration; its `dtype`, float32 if it has none, is that of the weights.
        experts_per_token: mean number of experts, 0 ... E, in every MoE layer. None takes from each layer what its
            selector is bound to use; if that is not fixed in some layer, the cost is given for 1, for 2 and for the
            most experts there.
        sequence_length: at least 1; None takes `max_position_embeddings`.

    Raises:
        ValueError: if one of these is out of range.
    """
    from transformers import AutoModelForCausalLM

    sequence_length = config.max_position_embeddings if sequence_length is None else sequence_length
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}.")
    if experts_per_token is not None and not 0 <= experts_per_token <= config.num_experts:
        raise ValueError(
            f"experts_per_token must be between 0 and num_experts ({config.num_experts}), got {experts_per_token}."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers, blocks = model.model.layers, model.moe_blocks()
    parameters = _count_parts(model)
    expert_sizes = [_num_parameters(block.experts) // config.num_experts for block in blocks]
    unrouted = sum(parameters.values()) - parameters["experts"]
    unrouted_flops = 2 * (_num_matrix_elements(layers) - parameters["experts"] + model.lm_head.weight.numel())
    unrouted_flops += sum(_attention_flops(layer, sequence_length) for layer in layers)
    if experts_per_token is None:
        choices = _experts_per_layer(blocks)
    else:
        choices = [[experts_per_token] * len(blocks)]
    activity = []
    for choice in choices:
        used = round(sum(size * count for size, count in zip(expert_sizes, choice, strict=True)))
        mean = sum(choice) / len(choice) if choice else 0.0
        activity.append(Activity(mean, unrouted + used, unrouted_flops + 2 * used))
    return Cost(
        parameters=parameters,
        dtype=str(model.dtype).removeprefix("torch."),
        weight_bytes=sum(tensor.nbytes for tensor in set(model.state_dict(keep_vars=True).values())),
        sequence_length=sequence_length,
        activity=tuple(activity),
    )


def _count_parts(model: DynMoeForCausalLM) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    counts["embedding"] = _num_parameters(model.model.embed_tokens)
    counts["norms"] = _num_parameters(model.model.norm)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        counts["head"] = _num_parameters(model.lm_head)
    for layer in model.model.layers:
        counts["attention"] += _num_parameters(layer.self_attn)
        counts["norms"] += _num_parameters(layer.input_layernorm, layer.post_attention_layernorm)
        if not layer.is_sparse:
            counts["dense"] += _num_parameters(layer.mlp)
            continue
        counts["router"] += _num_parameters(layer.mlp.gate, layer.mlp.selector)
        counts["experts"] += _num_parameters(layer.mlp.experts)
        if layer.mlp.shared_experts is not None:
            counts["shared_experts"] += _num_parameters(layer.mlp.shared_experts)
    return counts


def _experts_per_layer(blocks: list[DynMoeBlock]) -> list[list[int]]:
    """For each point of the count, the experts of a token in each MoE layer."""
    selectors = [block.selector for block in blocks]
    caps = [selector.num_slots for selector in selectors if not selector.fills_every_slot]
    points = sorted({min(point, max(caps)) for point in (1, 2, max(caps))}) if caps else [0]
    return [
        [each.num_slots if each.fills_every_slot else min(point, each.num_slots) for each in selectors]
        for point in points
    ]


def _attention_flops(layer: DynMoeDecoderLayer, sequence_length: int) -> int:
    """Scores and weighted sum of one token."""
    attention = layer.self_attn
    keys = min(sequence_length, attention.sliding_window or sequence_length)
    return 2 * 2 * attention.config.num_attention_heads * attention.head_dim * keys


def _num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _num_matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
