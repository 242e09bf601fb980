# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""The parts of the decoder that are not about experts: norm, rotary positions, attention.

Shapes as in routing.py; `H` attention heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from .buffers import KeepsBufferDtype
from .compat import ALL_ATTENTION_FUNCTIONS, ROPE_INIT_FUNCTIONS, dynamic_rope_update
from .configuration_dynmoe import DynMoeConfig
from .row_statistics import Visibility, received_attention, row_statistics


class DynMoeRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.float()
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.eps)).to(dtype)


class DynMoeRotaryEmbedding(KeepsBufferDtype):
    """Cosines and sines of the rotary positions, for every rope type that transformers knows."""

    def __init__(self, config: DynMoeConfig) -> None:
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: DynMoeConfig, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies (head_dim / 2,) of RoPE (Su et al. 2021, arXiv 2104.09864), and a scaling of 1."""
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device).float()
        angles = torch.cat((angles, angles), dim=-1)  # (B, S, head_dim)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to queries or keys (B, H, S, head_dim)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: output (B, S, H, head_dim) and probabilities (B, H, S, keys)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probs = F.dropout(probs, p=dropout, training=module.training)
    return torch.matmul(probs, value).transpose(1, 2).contiguous(), probs


class DynMoeAttention(nn.Module):
    """Grouped-query attention with rotary positions, through transformers' attention interface."""

    def __init__(self, config: DynMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.window_for(layer_idx)
        query_size = config.num_attention_heads * self.head_dim
        key_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            per_head = self.qk_norm == "per_head"
            self.q_norm = DynMoeRMSNorm(self.head_dim if per_head else query_size, config.rms_norm_eps)
            self.k_norm = DynMoeRMSNorm(self.head_dim if per_head else key_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        statistic: str | None = None,
        visibility: Visibility | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(B, S, D) -> (B, S, D); from backends that have them, the probabilities (B, H, S, keys); and, if a statistic
        of their rows is asked for, that statistic (B, S), which is computed in the same way for every backend."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
        if self.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = query.view(heads), key.view(heads)
        if self.qk_norm == "per_head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (
            rotate(query.transpose(1, 2), *position_embeddings),
            rotate(key.transpose(1, 2), *position_embeddings),
        )
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        importance = None
        if statistic == "learned":
            importance = received_attention(query, key, self.scaling, visibility)
        elif statistic is not None:
            importance = row_statistics(query, key, self.scaling, visibility, statistic)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probs = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), probs, importance
