# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""How sharply each token attends: row statistics of causal attention, the token importance of DA-MoE.

Aghdam et al. 2024, arXiv 2409.06669. A query row looks only at keys that exist when its token is processed, so decoding
with a cache gives what one full call gives. Attention received, a statistic of columns, would let it see its future.

The rows are computed again from the query and the key, whatever computed the attention itself: backends without a
matrix and backends that return it after dropout then agree.

Shapes as in routing.py; `H` query heads and `Hkv` key heads, `N` keys (the cache included).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from .compat import find_packed_sequence_indices
from .routing import without_autocast

STATISTICS: tuple[str, ...] = ("row_max", "row_max_norm", "row_max_nosink", "row_entropy", "self")
LATER_QUERIES = 16  # that must see a token before the attention it receives says something about it


class Visibility(NamedTuple):
    """Which keys each query of a call may attend to, without a matrix of all pairs."""

    query_positions: Tensor  # (S,) int64, position of each query in the cache
    key_positions: Tensor  # (N,) int64, consecutive; a static cache has positions that nothing fills yet
    window: int | None = None  # keys that a query sees at most, itself included
    real_keys: Tensor | None = None  # (B, N) bool, False on padding
    documents: Tensor | None = None  # (B, S) int64, the packed document of each token; only where N = S
    mask: Tensor | None = None  # (B or 1, 1 or H, S, N) bool, or float with 0 where visible; then it alone decides

    @classmethod
    def build(
        cls,
        attention_mask: Any,
        position_ids: Tensor,
        past_key_values: Cache | None,
        batch_size: int,
        sequence_length: int,
        layer_idx: int,
        window: int | None,
        device: torch.device,
    ) -> "Visibility":
        """What transformers' causal masks say for the layers with this window; before any layer updates the cache.

        Args:
            attention_mask: as given to the model: None, (B, cached and new tokens) with 1 on real ones, four
                dimensions, or a dictionary of such by layer type, where None is plainly causal.
            position_ids: (B or 1, S). Without mask and cache, a step other than 1 starts the next packed document.
            layer_idx: a layer with this window.

        Raises:
            ValueError: if the mask is something else, e.g. the block mask of flex attention.
        """
        packed = attention_mask is None and past_key_values is None
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask["full_attention" if window is None else "sliding_attention"]
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim in (2, 4)):
            raise ValueError("Routing by attention needs an attention_mask that is a tensor of 2 or 4 dimensions.")
        length, offset, start = sequence_length, 0, 0
        if past_key_values is not None:
            length, offset = past_key_values.get_mask_sizes(sequence_length, layer_idx)
            start = past_key_values.get_query_offset(layer_idx)
            start = start.to(device) if isinstance(start, Tensor) else start
        real_keys, mask = None, None
        if attention_mask is not None and attention_mask.ndim == 4:
            mask = attention_mask.to(device)
        elif attention_mask is not None:
            end = offset + length
            real_keys = F.pad(attention_mask.to(device, torch.bool), (0, max(0, end - attention_mask.shape[1])))
            real_keys = real_keys[:, offset:end]
        return cls(
            query_positions=torch.arange(sequence_length, device=device) + start,
            key_positions=torch.arange(length, device=device) + offset,
            window=window,
            real_keys=real_keys,
            documents=find_packed_sequence_indices(position_ids.expand(batch_size, -1)) if packed else None,
            mask=mask,
        )

    def reach(self, rows: slice) -> slice:
        """Keys outside of which these queries see none; all keys, where a cache or a mask does not tell at once."""
        num_queries, num_keys = self.query_positions.shape[0], self.key_positions.shape[0]
        if self.mask is not None or num_queries != num_keys:
            return slice(0, num_keys)
        return slice(0 if self.window is None else max(0, rows.start - self.window + 1), min(rows.stop, num_keys))

    def block(self, rows: slice) -> Tensor:
        """(B or 1, 1 or H, rows, N) bool: the keys that these queries see."""
        if self.mask is not None:
            mask = self.mask[:, :, rows]
            return mask if mask.dtype == torch.bool else mask == 0
        distance = self.query_positions[rows, None] - self.key_positions
        visible = (distance >= 0)[None, None]
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.real_keys is not None:
            visible = visible & self.real_keys[:, None, None]
        if self.documents is not None:
            visible = visible & (self.documents[:, None, rows, None] == self.documents[:, None, None])
        return visible


@torch.no_grad()
def row_statistics(
    query: Tensor, key: Tensor, scaling: float, visibility: Visibility, statistic: str, block_size: int = 128
) -> Tensor:
    """The importance of every token, one of `STATISTICS` of its attention row (arXiv 2409.06669), mean over heads.

    With A the probabilities of a row and n its visible keys: `row_max` max A; `row_max_norm` (max A - 1/n) / (1 - 1/n);
    `row_max_nosink` max A without the first visible key, renormalised; `row_entropy` the entropy of A / log n; `self`
    the probability of the token's own key. The three in the middle are 0 for n = 1.

    Args:
        query: (B, H, S, head_dim) as the attention used it, after norm and rotary positions.
        key: (B, Hkv, N, head_dim), likewise; query head h uses key head h // (H / Hkv).
        scaling: factor of the attention logits.
        block_size: queries at a time; memory is B * H * block_size * N.

    Returns:
        (B, S) in [0, 1] without gradient, 0 for a query that sees no key; float32, or float64 for float64 inputs.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype)
    importance = []
    with without_autocast(query.device.type):
        for start in range(0, query.shape[2], block_size):
            rows = slice(start, start + block_size)
            keys = visibility.reach(rows)
            logits = _logits(query[:, :, rows].to(dtype) * scaling, key[:, :, keys])
            own_key = visibility.query_positions[rows] - visibility.key_positions[keys][0]
            visible = visibility.block(rows)[..., keys]
            importance.append(_statistic(statistic, logits, visible, own_key).mean(1))
    return torch.cat(importance, dim=1)


@torch.no_grad()
def received_attention(
    query: Tensor, key: Tensor, scaling: float, visibility: Visibility, block_size: int = 128
) -> Tensor | None:
    """Attention that each token receives from real tokens, over what it would receive if rows were uniform.

    A statistic of columns: it looks into the future, so it may be a target of training and never an input. Arguments as
    in `row_statistics`.

    Returns:
        (B, S) >= 0 without gradient, NaN for padding and where fewer than `LATER_QUERIES` later tokens see the token;
        None if the call is not a whole sequence (`N != S`).
    """
    if key.shape[2] != query.shape[2]:
        return None
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype)
    received = uniform = later = 0.0
    with without_autocast(query.device.type):
        for start in range(0, query.shape[2], block_size):
            rows = slice(start, start + block_size)
            logits = _logits(query[:, :, rows].to(dtype) * scaling, key)
            visible = visibility.block(rows)
            if visibility.real_keys is not None:
                visible = visible & visibility.real_keys[:, None, rows, None]
            probs = logits.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)
            count = visible.sum(-1, keepdim=True, dtype=dtype)
            received = received + probs.sum(2).mean(1)
            uniform = uniform + (visible / count.clamp_min(1)).sum(2).mean(1)
            later = later + visible.sum(2).amax(1)
    # A token sees itself, which is no later query.
    return torch.where(later > LATER_QUERIES, received / uniform, torch.nan)


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """(B, H, rows, N) from queries (B, H, rows, head_dim) and keys (B, Hkv, N, head_dim)."""
    # The query heads of one key head are side by side: their rows become one long matrix for that key head.
    logits = query.reshape(*key.shape[:2], -1, key.shape[3]) @ key.transpose(2, 3)
    return logits.view(*query.shape[:3], -1)


def _statistic(statistic: str, logits: Tensor, visible: Tensor, own_key: Tensor) -> Tensor:
    """(B, H, rows) from logits (B, H, rows, N), visible keys that broadcast to them, and the index of each own key."""
    count = visible.sum(-1, dtype=logits.dtype)
    logits = logits.masked_fill(~visible, -math.inf)
    if statistic == "row_max_nosink":
        first = visible.byte().argmax(-1, keepdim=True)
        logits = logits.scatter(-1, first.expand(*logits.shape[:-1], 1), -math.inf)
        count = count - 1
    if statistic == "row_entropy":
        values = torch.special.entr(logits.softmax(-1)).sum(-1) / count.log()
    elif statistic == "self":
        own = logits.gather(-1, own_key[:, None].expand(*logits.shape[:-1], 1)).squeeze(-1)
        values = (own - logits.logsumexp(-1)).exp()
    else:
        values = (logits.amax(-1) - logits.logsumexp(-1)).exp()
    if statistic == "row_max_norm":
        values = (count * values - 1) / (count - 1)
    fewest = 2 if statistic in ("row_max_norm", "row_entropy") else 1
    return torch.where(count >= fewest, values, 0.0)
