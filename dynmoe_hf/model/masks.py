# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Which keys the queries of a call may see, once for every sliding window that layers have. Shapes as in routing.py."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .compat import create_causal_mask, create_sliding_window_causal_mask
from .row_statistics import Visibility


def next_positions(cache: Cache | None, sequence_length: int, device: torch.device) -> Tensor:
    """(1, S) positions after the cached ones."""
    start = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(sequence_length, device=device) + start)[None]


def attention_masks(
    config: Any,
    windows: set[int | None],
    hidden_states: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: Tensor,
) -> dict[int | None, Any]:
    """The mask of each window, None being full attention, in the form that the attention of the config takes."""
    if isinstance(attention_mask, dict):
        named = {"full_attention": None, "sliding_attention": config.sliding_window}
        return {named[name]: mask for name, mask in attention_mask.items()}
    arguments = {
        "config": config,
        "inputs_embeds": hidden_states,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "position_ids": position_ids,
    }
    return {
        window: create_causal_mask(**arguments) if window is None else create_sliding_window_causal_mask(**arguments)
        for window in windows
    }


def visibilities(
    layer_of_window: Mapping[int | None, int],
    hidden_states: Tensor,
    attention_mask: Any,
    cache: Cache | None,
    position_ids: Tensor,
    is_paged: bool,
) -> dict[int | None, Visibility]:
    """Sliding window -> which keys are visible, for layers whose selector reads attention.

    Args:
        layer_of_window: one such layer for each of their windows.

    Raises:
        ValueError: if there are such layers and the cache is a paged one.
    """
    if layer_of_window and is_paged:
        raise ValueError(
            "Routing by attention does not work with the paged cache of continuous batching, whose keys only the "
            "attention kernel sees: use generate() instead of generate_batch()."
        )
    return {
        window: Visibility.build(
            attention_mask, position_ids, cache, *hidden_states.shape[:2], layer_idx, window, hidden_states.device
        )
        for window, layer_idx in layer_of_window.items()
    }
