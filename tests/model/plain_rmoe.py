"""RMoE (Qiu et al. 2024, arXiv 2408.06793) from its formulas, in plain loops over layers and experts.

`released_model` computes what the released code does, from weights under the released names; `test_rmoe_vectors.py`
shows that it gives the recorded tensors.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]


def gru(weights: Tensors, inputs: Tensor, before: Tensor) -> Tensors:
    """One step; `weights` holds W_ir ... W_hn as `weight_ir` ... and the biases as `bias_ir` ..."""

    def gate(side: str, name: str, values: Tensor) -> Tensor:
        return values @ weights[f"weight_{side}{name}"].T + weights[f"bias_{side}{name}"]

    r = torch.sigmoid(gate("i", "r", inputs) + gate("h", "r", before))
    z = torch.sigmoid(gate("i", "z", inputs) + gate("h", "z", before))
    n = torch.tanh(gate("i", "n", inputs) + r * gate("h", "n", before))
    return {"r": r, "z": z, "n": n, "h": (1 - z) * n + z * before}


def rnn(weights: Tensors, inputs: Tensor, before: Tensor) -> Tensors:
    """One step of the plain cell."""
    own = inputs @ weights["weight_in"].T + weights["bias_in"]
    return {"h": torch.tanh(own + before @ weights["weight_hn"].T + weights["bias_hn"])}


def lstm(weights: Tensors, inputs: Tensor, before: Tensor, memory: Tensor) -> Tensors:
    """One step of the LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000)."""
    i, f, g, o = (
        inputs @ weights[f"weight_i{name}"].T
        + weights[f"bias_i{name}"]
        + before @ weights[f"weight_h{name}"].T
        + weights[f"bias_h{name}"]
        for name in "ifgo"
    )
    memory = f.sigmoid() * memory + i.sigmoid() * g.tanh()
    return {"h": o.sigmoid() * memory.tanh(), "memory": memory}


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (T, E) in float32, the k best experts (T, k) and their weights, which sum to 1."""
    probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    weights, experts = probs.topk(k, dim=-1)
    return probs, experts, weights / weights.sum(-1, keepdim=True)


def pooled_balance(logits: list[Tensor], k: int) -> Tensor:
    """The released loss: the tokens of all layers are one long batch."""
    probs, experts, _ = top_k(torch.cat(logits), k)
    num_experts = probs.shape[-1]
    return num_experts * (F.one_hot(experts, num_experts).to(probs.dtype).mean(0) * probs.mean(0)).sum()


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = hidden.float()
    return weight * (exact * (exact.square().mean(-1, keepdim=True) + eps).rsqrt()).to(hidden.dtype)


def rotate(heads: Tensor, theta: float) -> Tensor:
    """Rotary positions 0, 1, ... on (B, H, S, d)."""
    size = heads.shape[-1]
    angles = torch.arange(heads.shape[2])[:, None] * theta ** (-torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([part, part], -1).to(heads.dtype) for part in (angles.cos(), angles.sin()))
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], -1) * sin


def attention(weights: Tensors, hidden: Tensor, mask: Tensor, config: dict[str, Any]) -> Tensor:
    num_heads = config["num_attention_heads"]
    size = hidden.shape[-1] // num_heads
    query, key, value = (
        (hidden @ weights[f"{name}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2) for name in "qkv"
    )
    query, key = rotate(query, config["rope_theta"]), rotate(key, config["rope_theta"])
    key, value = (part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) / size**0.5 + mask.clamp(min=torch.finfo(hidden.dtype).min).to(hidden.dtype)
    output = scores.softmax(-1, dtype=torch.float32).to(hidden.dtype) @ value
    return output.transpose(1, 2).flatten(2) @ weights["o_proj.weight"].T


def swiglu(hidden: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T


def under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def released_block(
    weights: Tensors, cell: Tensors, hidden: Tensor, state: Tensor | None, config: dict[str, Any]
) -> tuple[Tensor, Tensor | None, Tensors]:
    """The routed part of a layer's MoE: output (T, D), the state for the next layer, and what was recorded."""
    record: Tensors = {}
    if config["moe_router_type"] in ("gru", "rnn"):
        record["router_proj"] = hidden @ weights["weight1"].T
        before = torch.zeros_like(record["router_proj"]) if state is None else state
        step = gru if config["moe_router_type"] == "gru" else rnn
        state = record["router_state"] = step(cell, record["router_proj"], before)["h"]
        record["router_logits"] = state @ weights["weight2"].T
    else:
        record["router_logits"] = hidden @ weights["gate.weight"].T
    _, experts, shares = top_k(record["router_logits"], config["num_experts_per_tok"])
    record |= {"topk_indices": experts, "topk_weights": shares}
    output = torch.zeros_like(hidden)
    for expert in range(config["num_local_experts"]):
        share = (shares * (experts == expert)).sum(-1, keepdim=True).to(hidden.dtype)
        matrices = (weights[f"experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2"))
        output = output + share * swiglu(hidden, *matrices)
    if config["add_moe_bias"]:
        output = output + weights["bias"]
    return output, state, record


def released_layer(
    weights: Tensors,
    cell: Tensors,
    hidden: Tensor,
    mask: Tensor,
    state: Tensor | None,
    is_dense: bool,
    config: dict[str, Any],
) -> tuple[Tensor, Tensor | None, Tensors]:
    """(B, S, D) after a decoder layer, the state for the next one, and what was recorded."""
    normed = rms_norm(hidden, weights["input_layernorm.weight"], config["rms_norm_eps"])
    hidden = hidden + attention(under(weights, "self_attn."), normed, mask, config)
    normed = rms_norm(hidden, weights["post_attention_layernorm.weight"], config["rms_norm_eps"])
    if is_dense:
        return hidden + swiglu(normed, *mlp(weights, "mlp")), state, {}
    tokens = normed.flatten(0, 1)
    output, state, record = released_block(under(weights, "block_sparse_moe."), cell, tokens, state, config)
    output = output.view_as(hidden)
    record |= {"ffn_input": normed, "moe_output": output}
    if config["add_moe_share_expert"]:
        shared = swiglu(normed, *mlp(weights, "mlp_share"))
        output = config["moe_weight"] * output + config["share_weight"] * shared
    return hidden + output, state, record


def mlp(weights: Tensors, name: str) -> list[Tensor]:
    return [weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down")]


def released_model(
    weights: Tensors, config: dict[str, Any], input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> Tensors:
    """Everything that a vector file records of one forward call, padding included, under its names there."""
    mask = padding_mask(attention_mask)
    hidden = weights["model.embed_tokens.weight"][input_ids]
    record, state, logits = {"out.hidden_states.0": hidden}, None, []
    num_layers = config["num_hidden_layers"]
    for layer in range(num_layers):
        own, cell = under(weights, f"model.layers.{layer}."), under(weights, "model.rnn_router.")
        is_dense = layer < num_layers - config["moe_num_layers"]
        hidden, state, parts = released_layer(own, cell, hidden, mask, state, is_dense, config)
        record |= {f"act.layers.{layer}.{name}": value for name, value in parts.items()}
        record[f"out.hidden_states.{layer + 1}"] = hidden
        if not is_dense:
            logits.append(parts["router_logits"])
    hidden = rms_norm(hidden, weights["model.norm.weight"], config["rms_norm_eps"])
    record[f"out.hidden_states.{num_layers}"] = hidden
    record["out.logits"] = hidden @ weights["lm_head.weight"].T
    predicted = record["out.logits"][:, :-1].float().flatten(0, 1)
    record["out.ce_loss"] = F.cross_entropy(predicted, labels[:, 1:].flatten())[None]
    record["out.aux_loss"] = pooled_balance(logits, config["num_experts_per_tok"])[None]
    record["out.loss"] = record["out.ce_loss"] + config["router_aux_loss_coef"] * record["out.aux_loss"]
    return record


def padding_mask(attention_mask: Tensor) -> Tensor:
    """(B, 1, S, S), the causal and the padding mask of the released code. A padding row attends to every key alike.

    Being 4-D, it lets our padding be routed like any token, as there.
    """
    size = attention_mask.shape[1]
    causal = torch.full((size, size), torch.finfo(torch.float32).min).triu(1)
    return causal.expand(len(attention_mask), 1, -1, -1).masked_fill(attention_mask[:, None, None] == 0, causal.min())
