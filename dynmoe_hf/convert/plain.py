"""What the released codes compute, written out on their own names: the other side of the comparison for formats that no
class of transformers runs.

Nothing here goes through the tables of this package or through its model. Each tensor is read when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Read = Callable[[str], Tensor]  # from the name of a tensor to its values


@torch.inference_mode()
def dynamic_moe_logits(read: Read, config: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    """Logits (B, S, V) of Dynamic_MoE: experts in the order of their probability until its sum exceeds p
    (Huang et al. 2024, arXiv 2403.07652, equations 3 and 4)."""
    config = {**config, "num_key_value_heads": config["num_attention_heads"], "rope_theta": 10000.0}
    eps = config.get("rms_norm_eps", 1e-6)
    hidden = read("model.embed_tokens.weight")[input_ids].float()
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        hidden = hidden + _attention(read, prefix, _norm(hidden, read(f"{prefix}input_norm.weight"), eps), config)
        inner = _norm(hidden, read(f"{prefix}post_attention_norm.weight"), eps)
        if layer % config.get("expert_frequency", 2):
            hidden = hidden + _ffn(inner, read, f"{prefix}mlp.mlp.", config)
            continue
        probs = (inner @ read(f"{prefix}mlp.router.weight").float().T).softmax(-1)
        ordered, order = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered * (before <= config.get("top_p_threshold", 0.4))
        weights = torch.zeros_like(probs).scatter(-1, order, kept)
        for expert in range(config["num_experts"]):
            output = _ffn(inner, read, f"{prefix}mlp.experts.{expert}.", config)
            hidden = hidden + weights[..., expert, None] * output
    return _head(hidden, read, config, eps)


@torch.inference_mode()
def rmoe_logits(read: Read, config: Mapping[str, Any], input_ids: Tensor) -> Tensor:
    """Logits (B, S, V) of RMoE's `llama_moe_rnn`: a recurrent cell over depth feeds the routers
    (Qiu et al. 2024, arXiv 2408.06793, section 3)."""
    num_layers, eps = config["num_hidden_layers"], config.get("rms_norm_eps", 1e-6)
    hidden, state = read("model.embed_tokens.weight")[input_ids].float(), None
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        inner = _norm(hidden, read(f"{prefix}input_layernorm.weight"), eps)
        hidden = hidden + _attention(read, prefix, inner, config)
        inner = _norm(hidden, read(f"{prefix}post_attention_layernorm.weight"), eps)
        if layer < num_layers - config.get("moe_num_layers", num_layers):
            hidden = hidden + _ffn(inner, read, f"{prefix}mlp.", config)
            continue
        block = f"{prefix}block_sparse_moe."
        if config.get("moe_router_type") in ("gru", "rnn"):
            projected = inner @ read(f"{block}weight1").float().T
            before = torch.zeros_like(projected) if state is None else state
            state = _cell(read, config["moe_router_type"], projected, before)
            logits = state @ read(f"{block}weight2").float().T
        else:
            logits = inner @ read(f"{block}gate.weight").float().T
        best, chosen = logits.softmax(-1).topk(config["num_experts_per_tok"])
        weights = torch.zeros_like(logits).scatter(-1, chosen, best / best.sum(-1, keepdim=True))
        output = torch.zeros_like(hidden)
        for expert in range(config["num_local_experts"]):
            own = f"{block}experts.{expert}."
            output = output + weights[..., expert, None] * _ffn(inner, read, own, config, ("w1", "w3", "w2"))
        if config.get("add_moe_bias"):
            output = output + read(f"{block}bias").float()
        if config.get("add_moe_share_expert"):
            shared = _ffn(inner, read, f"{prefix}mlp_share.", config)
            output = config.get("moe_weight", 0.5) * output + config.get("share_weight", 0.5) * shared
        hidden = hidden + output
    return _head(hidden, read, config, eps)


def _cell(read: Read, kind: str, inputs: Tensor, before: Tensor) -> Tensor:
    """One step of the GRU, or of the plain cell, which is its last gate alone."""

    def gate(side: str, name: str, values: Tensor) -> Tensor:
        weight, bias = (read(f"model.rnn_router.{part}_{side}{name}").float() for part in ("weight", "bias"))
        return values @ weight.T + bias

    if kind == "rnn":
        return torch.tanh(gate("i", "n", inputs) + gate("h", "n", before))
    reset = torch.sigmoid(gate("i", "r", inputs) + gate("h", "r", before))
    update = torch.sigmoid(gate("i", "z", inputs) + gate("h", "z", before))
    new = torch.tanh(gate("i", "n", inputs) + reset * gate("h", "n", before))
    return (1 - update) * new + update * before


def _norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight.float() * hidden * (hidden.square().mean(-1, keepdim=True) + eps).rsqrt()


def _attention(read: Read, prefix: str, inner: Tensor, config: Mapping[str, Any]) -> Tensor:
    num_heads = config["num_attention_heads"]
    size = inner.shape[-1] // num_heads
    query, key, value = (
        (inner @ read(f"{prefix}self_attn.{name}_proj.weight").float().T).unflatten(-1, (-1, size)).transpose(1, 2)
        for name in "qkv"
    )
    theta = config.get("rope_theta", 10000.0)
    positions, pairs = torch.arange(inner.shape[1]), torch.arange(0, size, 2)
    angles = positions[:, None] * theta ** (-pairs / size)
    turns = torch.polar(torch.ones_like(angles), angles)
    query, key = (_turn(heads, turns) for heads in (query, key))
    key, value = (part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / size**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    output = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
    return output.transpose(1, 2).flatten(2) @ read(f"{prefix}self_attn.o_proj.weight").float().T


def _turn(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: the two halves of a head are the real and the imaginary parts."""
    turned = torch.complex(*heads.chunk(2, dim=-1)) * turns
    return torch.cat([turned.real, turned.imag], dim=-1)


def _ffn(
    inner: Tensor,
    read: Read,
    prefix: str,
    config: Mapping[str, Any],
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Tensor:
    gate, up, down = (read(f"{prefix}{name}.weight").float() for name in names)
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={config['hidden_act']!r}: the comparison knows silu only; --no-check skips it.")
    return (F.silu(inner @ gate.T) * (inner @ up.T)) @ down.T


def _head(hidden: Tensor, read: Read, config: Mapping[str, Any], eps: float) -> Tensor:
    name = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return _norm(hidden, read("model.norm.weight"), eps) @ read(name).float().T


PLAIN_LOGITS = {"dynamic_moe": dynamic_moe_logits, "rmoe": rmoe_logits}
