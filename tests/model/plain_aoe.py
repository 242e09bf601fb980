"""AoE as its definition has it, by plain autograd, and blocks to compare with it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, build_experts


def make_block(
    engine: str = "eager",
    dtype: torch.dtype = torch.float64,
    std: float = 0.5,
    routing: dict[str, Any] | None = None,
    **sizes: int,
) -> DynMoeBlock:
    """A block with seeded weights; D=16, E=6, k=2, r=8 and W=24 unless `sizes` say otherwise."""
    sizes = {"hidden_size": 16, "num_experts": 6, "num_experts_per_tok": 2, "rank": 8, "width": 24} | sizes
    experts = {"rank": sizes.pop("rank"), "intermediate_size": sizes.pop("width")}
    config = DynMoeConfig(
        **sizes,
        num_attention_heads=1,
        routing={"method": "aoe", "experts": experts, **(routing or {})},
        experts_implementation=engine,
    )
    block = DynMoeBlock(config, 0, build_experts)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return block.to(dtype)


def inputs_for(block: DynMoeBlock, num_tokens: int, seed: int = 1) -> Tensor:
    """(1, T, D) in the dtype of the block."""
    weight = block.experts.gate_down_proj
    inputs = torch.randn(1, num_tokens, weight.shape[-1], generator=torch.Generator().manual_seed(seed))
    return inputs.to(weight.dtype).requires_grad_()


def plain_block(weights: Mapping[str, Tensor], inputs: Tensor, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Output (T, D) and scores (T, E) of two experts for each token: the definition, by plain autograd, every expert
    on every token. The scores are the norms unless there is a linear router."""
    hidden_states = inputs.flatten(0, -2)
    activations = torch.einsum("td,erd->ter", hidden_states, weights["experts.gate_down_proj"])
    exact = activations.to(torch.promote_types(activations.dtype, torch.float32))
    scores = exact.square().sum(-1).sqrt()
    if "gate.weight" in weights:
        scores = hidden_states @ weights["gate.weight"].T
    probs = scores.softmax(-1)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
    gates = probs * chosen
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True)
    gate = torch.einsum("ter,ewr->tew", activations, weights["experts.gate_up_proj_lowrank"])
    up = torch.einsum("td,ewd->tew", hidden_states, weights["experts.up_proj"])
    down = torch.einsum("tew,edw->ted", gate * torch.sigmoid(gate) * up, weights["experts.down_proj"])
    return (gates[..., None] * down).sum(1), scores


def balance(scores: Tensor) -> Tensor:
    """Load-balance loss of two experts for each token, in the dtype of the scores."""
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
    return scores.shape[1] * (chosen.mean(0) * scores.softmax(-1).mean(0)).sum()


def gradients(output: Tensor, scores: Tensor, aux: bool, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    loss = (output * probe).sum() + (balance(scores) if aux else 0.0)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def leaves_of(block: DynMoeBlock, inputs: Tensor) -> dict[str, Tensor]:
    return {**dict(block.named_parameters()), "inputs": inputs}
