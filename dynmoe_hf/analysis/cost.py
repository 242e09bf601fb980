"""What a configuration costs: parameters, active parameters, memory and FLOPs, without building its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from dynmoe_hf import DynMoeConfig
    from dynmoe_hf.model.blocks import DynMoeBlock
    from dynmoe_hf.model.modeling_dynmoe import DynMoeDecoderLayer, DynMoeForCausalLM

HIGH_OVERHEAD = 0.25  # of activation-norm routing, as a share of the products of the used experts

PARTS = ("embedding", "attention", "router", "experts", "shared_experts", "dense", "norms", "head")


@dataclass(frozen=True)
class Activity:
    """What one token costs at a given number of experts.

    Args:
        experts_per_token: mean over the routers.
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
        notes: what else a user should know before training.
    """

    parameters: dict[str, int]
    dtype: str
    weight_bytes: int
    sequence_length: int
    activity: tuple[Activity, ...]
    notes: tuple[str, ...]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def count_cost(
    config: DynMoeConfig,
    experts_per_token: float | Sequence[float] | None = None,
    sequence_length: int | None = None,
) -> Cost:
    """Count parameters, memory and FLOPs of the language model of a configuration, on the meta device.

    Counting rules:

    * a parameter that is shared counts once, so a tied head has none of its own;
    * active parameters are all parameters but those of the experts that a token does not use. Embedding and head count
      in full, as in the papers that publish such figures; of experts that are ranked by their own activation, the
      matrix that gives it counts for all of them;
    * FLOPs are those of matrix products in one forward pass, a multiply-add being two: projections, router (a shared
      cell in every layer that uses it), experts, head, and attention, whose scores and weighted sum, and statistics of
      its rows, each take 2 x heads x head_dim for every key. A token counts `sequence_length` keys, or the sliding
      window if that is shorter: what a kernel computes that masks the future rather than skipping it (PaLM, Chowdhery
      et al. 2022, arXiv 2204.02311, appendix B). Norms, activations, softmax, selection and the embedding look-up are
      left out.

    Args:
        config: a valid configuration; its `dtype`, float32 if it has none, is that of the weights.
        experts_per_token: mean number of experts, 0 ... E, of every router, or (L,) of each; a cartesian layer has two.
            None takes from each router what its selector is bound to use; if that is not fixed for some router, the
            cost is given for 1, for 2, for the target of a controller, and for the most experts there.
        sequence_length: at least 1; None takes `max_position_embeddings`.

    Raises:
        ValueError: if one of these is out of range.
    """
    sequence_length = config.max_position_embeddings if sequence_length is None else sequence_length
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be at least 1, got {sequence_length}.")
    means = experts_per_token if isinstance(experts_per_token, Sequence) else [experts_per_token or 0]
    if not all(0 <= mean <= config.num_experts for mean in means):
        raise ValueError(
            f"experts_per_token must be between 0 and num_experts ({config.num_experts}), got {experts_per_token}."
        )
    model = build_on_meta(config)
    layers, blocks = model.model.layers, model.moe_blocks()
    parameters = _count_parts(model)
    expert_sizes = [_routed_size(block) for block in blocks]
    routed = config.num_experts * sum(expert_sizes)
    unrouted = sum(parameters.values()) - routed
    unrouted_flops = 2 * (_num_matrix_elements(layers) - routed + model.lm_head.weight.numel())
    unrouted_flops += sum(_attention_flops(layer, sequence_length) for layer in layers)
    for block in blocks:
        if block.spec["scorer"]["type"] in model.model.shared_scorers:
            unrouted_flops += 2 * _num_matrix_elements(model.model.shared_scorers[block.spec["scorer"]["type"]])
    if experts_per_token is None:
        choices = _experts_per_layer(blocks)
    elif isinstance(experts_per_token, Sequence):
        choices = [list(experts_per_token)]
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
        notes=_notes(blocks),
    )


def build_on_meta(config: DynMoeConfig) -> DynMoeForCausalLM:
    """The language model of a configuration, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _count_parts(model: DynMoeForCausalLM) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    counts["embedding"] = num_parameters(model.model.embed_tokens)
    counts["norms"] = num_parameters(model.model.norm)
    counts["router"] = num_parameters(model.model.shared_scorers)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        counts["head"] = num_parameters(model.lm_head)
    for layer in model.model.layers:
        counts["attention"] += num_parameters(layer.self_attn)
        counts["norms"] += num_parameters(layer.input_layernorm, layer.post_attention_layernorm)
        if not layer.is_sparse:
            counts["dense"] += num_parameters(layer.mlp)
            continue
        if layer.is_cartesian:
            counts["norms"] += num_parameters(layer.mlp.inner_norm)
    for block in model.moe_blocks():
        counts["router"] += num_parameters(block.gate, block.selector)
        counts["experts"] += num_parameters(block.experts)
        if block.output_bias is not None:
            counts["experts"] += block.output_bias.numel()
        if block.shared_experts is not None:
            counts["shared_experts"] += num_parameters(block.shared_experts)
        if block.shared_expert_gate is not None:
            counts["shared_experts"] += num_parameters(block.shared_expert_gate)
    return counts


def _routed_size(block: DynMoeBlock) -> int:
    """Parameters of one expert that only the tokens that use it need."""
    always = block.experts.gate_down_proj.numel() if block.gate.reads_norms else 0
    return (num_parameters(block.experts) - always) // block.experts.num_experts


def _notes(blocks: list[DynMoeBlock]) -> tuple[str, ...]:
    """A warning if ranking experts by their own activation costs much beside the experts themselves."""
    overheads = []
    for block in blocks:
        if block.gate.reads_norms:
            ranked, used = block.experts.gate_down_proj[0].numel(), block.selector.num_slots
            unused = block.experts.num_experts - used
            overheads.append(unused * ranked / (used * (_routed_size(block) + ranked)))
    if not overheads or max(overheads) <= HIGH_OVERHEAD:
        return ()
    return (
        f"Ranking the experts by their activation costs {max(overheads):.0%} of the products of the used experts; this "
        "method is meant for few, wide experts (arXiv 2501.13074).",
    )


def _experts_per_layer(blocks: list[DynMoeBlock]) -> list[list[float]]:
    """For each point of the count, the experts of a token at each router."""
    selectors = [block.selector for block in blocks]
    caps = [selector.num_slots for selector in selectors if not selector.fills_every_slot]
    flat = [block.spec["controller"] for block in blocks if block.bank is None]
    targets = [controller["target"] for controller in flat if controller["type"] == "budget"]
    points = sorted({min(point, max(caps)) for point in (1, 2, *targets, max(caps))}) if caps else [0]
    return [
        [each.num_slots if each.fills_every_slot else min(point, each.num_slots) for each in selectors]
        for point in points
    ]


def _attention_flops(layer: DynMoeDecoderLayer, sequence_length: int) -> int:
    """Scores and weighted sum of one token, and the scores once more where a statistic of them is taken."""
    attention = layer.self_attn
    keys = min(sequence_length, attention.sliding_window or sequence_length)
    products = 3 if layer.is_sparse and layer.mlp.statistic is not None else 2
    return products * 2 * attention.config.num_attention_heads * attention.head_dim * keys


def num_parameters(*modules: nn.Module) -> int:
    """Parameters of all modules together."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _num_matrix_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)
