"""What a token gets does not depend on how calls are cut: batches, padding, packing, chunks, positions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model.methods import METHODS
from tests.tiny import tiny_model, tokens

LENGTHS = (3, 9, 6, 1)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
# 0.02 is what models start from: then all experts are about equally probable, and choices are close.
SPREADS = (0.02, 0.2)
WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def routed(model: DynMoeForCausalLM, *args: Any, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, S, V), and the expert ids (B, S, K) of every router."""
    with torch.no_grad():
        output = model(*args, output_routing=True, **options)
    ids = [routing.expert_ids for routing in output.routing if routing is not None]
    return output.logits, [one.view(*output.logits.shape[:2], -1) for one in ids]


def agree(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(first[0], second[0], **TOLERANCE)
    for expected, found in zip(first[1], second[1], strict=True):
        assert torch.equal(expected, found), "other experts were chosen"


def part(output: tuple[Tensor, list[Tensor]], row: int, where: slice) -> tuple[Tensor, list[Tensor]]:
    return output[0][row : row + 1, where], [ids[row : row + 1, where] for ids in output[1]]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_alone_and_in_a_padded_batch(method: str, side: str, spread: float) -> None:
    model = tiny_model(method, "ragged", initializer_range=spread)
    rows = [tokens(1, length, seed=length) for length in LENGTHS]
    longest = max(LENGTHS) + 2  # a column of padding for all of them
    batch, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    places = [slice(longest - length, None) if side == "left" else slice(0, length) for length in LENGTHS]
    for row, (content, place) in enumerate(zip(rows, places, strict=True)):
        batch[row, place], mask[row, place] = content[0], 1
    together = routed(model, batch, attention_mask=mask)
    for row, (content, place) in enumerate(zip(rows, places, strict=True)):
        agree(part(together, row, place), routed(model, content))


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_documents_do_not_see_each_other(method: str, changes: dict[str, Any]) -> None:
    model = tiny_model(method, **changes)
    rows = [tokens(1, length, seed=length) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = routed(model, torch.cat(rows, dim=1), position_ids=positions, use_cache=False)
    start = 0
    for content, length in zip(rows, LENGTHS, strict=True):
        agree(part(packed, 0, slice(start, start + length)), routed(model, content))
        start += length


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["full", "windows"])
@pytest.mark.parametrize("method", METHODS)
def test_a_prefill_in_chunks(method: str, changes: dict[str, Any], cache: str) -> None:
    model = tiny_model(method, **changes)
    content = tokens(2, 12)
    whole = routed(model, content, use_cache=False)
    past = StaticCache(config=model.config, max_cache_len=16) if cache == "static" else None
    start = 0
    for size in (5, 1, 4, 2):
        with torch.no_grad():
            output = model(content[:, start : start + size], past_key_values=past, use_cache=True, output_routing=True)
        past = output.past_key_values
        ids = [routing.expert_ids.view(2, size, -1) for routing in output.routing if routing is not None]
        where = slice(start, start + size)
        agree((output.logits, ids), (whole[0][:, where], [each[:, where] for each in whole[1]]))
        start += size


@pytest.mark.parametrize("method", METHODS)
def test_chunks_after_left_padding(method: str) -> None:
    model = tiny_model(method)
    content = tokens(2, 10)
    mask = torch.ones_like(content)
    mask[0, :4] = 0
    first = model(content[:, :7], attention_mask=mask[:, :7], use_cache=True)
    rest = model(content[:, 7:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, rest.logits], dim=1)
    torch.testing.assert_close(logits[:1, 4:], model(content[:1, 4:]).logits, **TOLERANCE)
    torch.testing.assert_close(logits[1:], model(content[1:]).logits, **TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_positions(method: str) -> None:
    """Those that are given are the default ones, and only their differences matter."""
    model = tiny_model(method)
    content = tokens(2, 8)
    default = routed(model, content)
    for positions in (torch.arange(8)[None], torch.arange(8).expand(2, 8), torch.arange(8)[None] + 11):
        agree(routed(model, content, position_ids=positions), default)
    spaced, _ = routed(model, content, position_ids=3 * torch.arange(8)[None], attention_mask=torch.ones_like(content))
    assert not torch.allclose(spaced, default[0], **TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_two_passes_are_equal_bit_by_bit(method: str) -> None:
    """Also in training, where nothing adds noise."""
    content = tokens(3, 9)
    for engine in ("eager", "ragged", "grouped_mm"):
        model = tiny_model(method, engine)
        expected = model(content).logits
        assert torch.equal(model(content).logits, expected)
        assert torch.equal(model.train()(content).logits, expected)
        assert torch.equal(model(content, use_cache=False, labels=content).logits, expected)
