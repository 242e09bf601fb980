"""The token importance of DA-MoE against recorded vectors, a softmax written out, and transformers' own masks."""

import itertools
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate, create_sliding_window_causal_mask

from dynmoe_hf.model.row_statistics import STATISTICS, Visibility, received_attention, row_statistics
from tests.recorded import FOLDER
from tests.tiny import tiny_config

FILE = FOLDER / "da_moe_ref_f64.safetensors"
BATCH, HEADS, KEY_HEADS, LENGTH, SIZE, WINDOW = 2, 4, 2, 12, 6, 4
EXACT = {"rtol": 0.0, "atol": 1e-12}
CLOSE = {"rtol": 0.0, "atol": 1e-6}
CHUNKS = ([12], [5, 7], [3, 1, 4, 2, 1, 1], [1] * 12)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(FILE)


def visibility_of(
    mask: Tensor | dict | None, length: int, window: int | None = None, positions: Tensor | None = None
) -> Visibility:
    """One call without a cache."""
    positions = torch.arange(length)[None] if positions is None else positions
    return Visibility.build(mask, positions, None, BATCH, length, 0, window, torch.device("cpu"))


def random_states(length: int = LENGTH, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Query and key wide enough for sharp and flat rows."""
    generator = torch.Generator().manual_seed(seed)
    query = 2.0 * torch.randn(BATCH, HEADS, length, SIZE, generator=generator, dtype=torch.float64)
    key = torch.randn(BATCH, KEY_HEADS, length, SIZE, generator=generator, dtype=torch.float64)
    return query.to(dtype), key.to(dtype)


def row_by_hand(probs: list[float], statistic: str, own: int) -> float:
    """A statistic of the probabilities of the visible keys; `own` is the query's own among them, -1 if not seen."""
    count = len(probs)
    if count == 0:
        return 0.0
    if statistic == "row_max":
        return max(probs)
    if statistic == "self":
        return probs[own] if own >= 0 else 0.0
    if count == 1:
        return 0.0
    if statistic == "row_max_norm":
        return (max(probs) - 1 / count) / (1 - 1 / count)
    if statistic == "row_max_nosink":
        return max(probs[1:]) / sum(probs[1:])
    return -sum(p * math.log(p) for p in probs) / math.log(count)


def by_hand(query: Tensor, key: Tensor, scaling: float, visible: Tensor, statistic: str) -> Tensor:
    """One softmax for each query over nothing but its visible keys (B, H, S, N); query t's own key is key t."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    importance = torch.zeros(query.shape[:3], dtype=torch.float64)
    for row in itertools.product(*map(range, query.shape[:3])):
        seen = visible[row].nonzero().flatten().tolist()
        probs = (key[row[:2]][seen] @ query[row] * scaling).softmax(-1).tolist()
        own = seen.index(row[2]) if row[2] in seen else -1
        importance[row] = row_by_hand(probs, statistic, own)
    return importance.mean(1)


def visible_by_hand(
    length: int, window: int | None = None, real: Tensor | None = None, documents: Tensor | None = None
) -> Tensor:
    """(B, H, S, S) bool."""
    visible = torch.zeros(BATCH, HEADS, length, length, dtype=torch.bool)
    for sequence in range(BATCH):
        for query in range(length):
            for key in range(query + 1):
                near = window is None or query - key < window
                kept = real is None or bool(real[sequence, key])
                same = documents is None or documents[sequence, query] == documents[sequence, key]
                visible[sequence, :, query, key] = bool(near and kept and same)
    return visible


@pytest.mark.parametrize("kind, window", [("full", None), ("window4", 4)])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_recorded_vectors(vectors: dict[str, Tensor], statistic: str, kind: str, window: int | None) -> None:
    visibility = visibility_of(vectors["attention_mask"], 10, window)
    expected = vectors[f"{kind}.importance.{statistic}"]
    computed = row_statistics(vectors["query"], vectors["key"], 6**-0.5, visibility, statistic)
    torch.testing.assert_close(computed, expected, **EXACT)
    single = row_statistics(vectors["query"].float(), vectors["key"].float(), 6**-0.5, visibility, statistic)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, **CLOSE)
    num_experts = (8 * single - 1e-4).ceil().clamp(1, 8).long()
    assert torch.equal(num_experts, vectors[f"{kind}.num_experts.{statistic}"])


def test_recorded_streaming_numbers(vectors: dict[str, Tensor]) -> None:
    """The maximum of a row is exp(maximal logit - logsumexp), and n counts the keys that are left."""
    visibility = visibility_of(vectors["attention_mask"], 10)
    real = vectors["attention_mask"].bool()
    streamed = (vectors["row_max_logit"] - vectors["row_lse"]).exp().mean(1)
    computed = row_statistics(vectors["query"], vectors["key"], 6**-0.5, visibility, "row_max")
    torch.testing.assert_close(computed[real], streamed[real], **EXACT)
    assert torch.equal(visibility.block(slice(None)).sum(-1)[:, 0], vectors["visible_keys"])
    assert (computed[~real] == 0).all()


WORKED = {
    "row_max": [1.0, 0.7, 0.65, 0.425],
    "row_max_norm": [0.0, 0.4, 0.475, 0.233333],
    "row_entropy": [0.0, 0.734498, 0.797410, 0.892738],
    "self": [1.0, 0.3, 0.35, 0.425],
    "row_max_nosink": [0.0, 1.0, 0.708333, 0.5],
}


def test_every_statistic_has_a_worked_example() -> None:
    """Attention received is not among them: it would let a token see its future."""
    assert set(WORKED) == set(STATISTICS)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_worked_example(statistic: str) -> None:
    """With the unit vectors as keys, the logits are the query: the logarithms of the wanted probabilities."""
    rows = [
        [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]],
        [[1.0], [0.9, 0.1], [0.2, 0.2, 0.6], [0.1, 0.1, 0.2, 0.6]],
    ]
    query = torch.full((1, 2, 4, 4), 5.0, dtype=torch.float64)  # large where causality must hide it
    for head, position in ((head, position) for head in range(2) for position in range(4)):
        query[0, head, position, : position + 1] = torch.tensor(rows[head][position], dtype=torch.float64).log()
    key = torch.eye(4, dtype=torch.float64)[None, None]
    visibility = Visibility(torch.arange(4), torch.arange(4))
    computed = row_statistics(query, key, 1.0, visibility, statistic)[0]
    torch.testing.assert_close(computed, torch.tensor(WORKED[statistic], dtype=torch.float64), rtol=0, atol=5e-7)


LEFT_PADDED = torch.tensor([[1] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)])
HOLES = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 0, 0, 1, 2, 3, 4, 0, 1, 2]])
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] + [2] * 5 + [3] * 3])


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("window", [None, 1, WINDOW, 30])
@pytest.mark.parametrize("kind", ["plain", "left padding", "holes", "packed"])
def test_a_softmax_written_out(kind: str, window: int | None, statistic: str) -> None:
    mask = {"left padding": LEFT_PADDED, "holes": HOLES}.get(kind)
    positions, documents = (PACKED, DOCUMENTS) if kind == "packed" else (None, None)
    query, key = random_states(seed=3)
    visibility = visibility_of(mask, LENGTH, window, positions)
    expected = by_hand(query, key, 0.7, visible_by_hand(LENGTH, window, mask, documents), statistic)
    computed = row_statistics(query, key, 0.7, visibility, statistic, block_size=5)
    torch.testing.assert_close(computed, expected, **EXACT)


def test_packed_documents_are_read_only_without_mask_and_cache() -> None:
    """As in transformers, which then takes the mask at its word."""
    ones = torch.ones(BATCH, LENGTH, dtype=torch.long)
    assert visibility_of(None, LENGTH, positions=PACKED).documents is not None
    assert visibility_of(ones, LENGTH, positions=PACKED).documents is None
    assert visibility_of({"full_attention": None}, LENGTH, positions=PACKED).documents is None
    cached = Visibility.build(None, PACKED, DynamicCache(), BATCH, LENGTH, 0, None, torch.device("cpu"))
    assert cached.documents is None
    one_row = visibility_of(None, LENGTH, positions=PACKED[:1])
    assert torch.equal(one_row.documents, DOCUMENTS[:1].expand(BATCH, -1))


@pytest.mark.parametrize("shape", [(BATCH, HEADS), (1, 1), (BATCH, 1), (1, HEADS)])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_mask_of_four_dimensions_decides_alone(statistic: str, shape: tuple[int, int]) -> None:
    """Boolean or additive, not causal, and with rows that see nothing."""
    query, key = random_states(seed=4)
    visible = torch.rand(*shape, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)) < 0.4
    visible[:, :, 3] = False
    expected = by_hand(query, key, 0.7, visible.expand(BATCH, HEADS, -1, -1), statistic)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (visible, additive, {"full_attention": None, "sliding_attention": visible}):
        visibility = visibility_of(mask, LENGTH, WINDOW, PACKED)
        computed = row_statistics(query, key, 0.7, visibility, statistic, block_size=5)
        torch.testing.assert_close(computed, expected, **EXACT)
    assert (computed[:, 3] == 0).all()


@pytest.mark.parametrize("mask", [torch.ones(BATCH, 1, LENGTH), SimpleNamespace(shape=(1, 1, 1, 1))])
def test_other_masks_are_refused(mask: object) -> None:
    with pytest.raises(ValueError, match="2 or 4 dimensions"):
        visibility_of(mask, LENGTH)


def test_uniform_rows() -> None:
    """n equal keys: exactly E / n experts wherever n divides E, in float32 too."""
    length = 16
    query, key = torch.zeros(BATCH, HEADS, length, SIZE), torch.ones(BATCH, KEY_HEADS, length, SIZE)
    count = torch.arange(1, length + 1, dtype=torch.float32)
    several = (count > 1).float()
    expected = {
        "row_max": 1 / count,
        "row_max_norm": torch.zeros(length),
        "row_max_nosink": torch.cat([torch.zeros(1), 1 / (count[1:] - 1)]),
        "row_entropy": several,
        "self": 1 / count,
    }
    for statistic in STATISTICS:
        computed = row_statistics(query, key, 1.0, visibility_of(None, length), statistic)
        torch.testing.assert_close(computed, expected[statistic].expand(BATCH, -1), **CLOSE)
    importance = row_statistics(query, key, 1.0, visibility_of(None, length), "row_max")[0]
    num_experts = (8 * importance - 1e-4).ceil()
    assert [int(num_experts[n - 1]) for n in (1, 2, 4, 8, 16)] == [8, 4, 2, 1, 1]


def cache_config(attention: str = "eager"):
    """Layer 0 sees everything, layer 1 a window."""
    return tiny_config(
        None,
        num_hidden_layers=2,
        mlp_layer_types=None,
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=WINDOW,
        attn_implementation=attention,
    )


def make_cache(kind: str, config) -> DynamicCache | StaticCache:
    if kind == "static":
        return StaticCache(config=config, max_cache_len=LENGTH + 3)
    return DynamicCache() if kind == "unlimited" else DynamicCache(config=config)


def calls(chunks: list[int], mask: Tensor | None):
    """Start, end and attention mask of each call."""
    end = 0
    for size in chunks:
        start, end = end, end + size
        yield start, end, None if mask is None else mask[:, :end]


@cache
def one_call(layer: int, padded: bool, statistic: str) -> Tensor:
    visible = visible_by_hand(LENGTH, (None, WINDOW)[layer], LEFT_PADDED if padded else None)
    return by_hand(*random_states(seed=6 + layer), 0.7, visible, statistic)


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prepared", ["by the model", "eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "unlimited", "static"])
def test_decoding_in_chunks_equals_one_call(kind: str, prepared: str, padded: bool, chunks: list[int]) -> None:
    """Also with the masks that `generate` prepares for a static cache; the visibility is built before any update."""
    config = cache_config("eager" if prepared == "by the model" else prepared)
    past = make_cache(kind, config)
    found: dict[tuple[int, str], list[Tensor]] = {(i, name): [] for i in range(2) for name in STATISTICS}
    for start, end, mask in calls(chunks, LEFT_PADDED if padded else None):
        positions = torch.arange(start, end)[None]
        if prepared != "by the model":
            embeds = torch.empty(BATCH, end - start, 0)
            mask = create_masks_for_generate(config, embeds, mask, past, position_ids=positions)
        arguments = (mask, positions, past, BATCH, end - start)
        built = [Visibility.build(*arguments, i, (None, WINDOW)[i], torch.device("cpu")) for i in range(2)]
        for i in range(2):
            query, key = (states[:, :, start:end] for states in random_states(seed=6 + i))
            keys = past.update(key, key, i)[0]
            for name in STATISTICS:
                found[i, name].append(row_statistics(query, keys, 0.7, built[i], name, block_size=3))
    for (i, name), parts in found.items():
        torch.testing.assert_close(torch.cat(parts, 1), one_call(i, padded, name), **EXACT)


SHORT = torch.tensor([[1, 1, 0], [0, 1, 1]])
MASKS = {"none": None, "left padding": LEFT_PADDED, "holes": HOLES, "short": SHORT, "whole": HOLES}
CALLS = [("no cache", name, [LENGTH]) for name in ("none", "left padding", "holes")]
CALLS += list(itertools.product(["dynamic", "unlimited", "static"], MASKS, CHUNKS))


@pytest.mark.parametrize("kind, name, chunks", CALLS, ids=str)
def test_visible_keys_are_those_of_transformers(kind: str, name: str, chunks: list[int]) -> None:
    mask = MASKS[name]
    config = cache_config()
    past = None if kind == "no cache" else make_cache(kind, config)
    positions = PACKED if mask is None else torch.arange(LENGTH)[None]
    for start, end, seen in calls(chunks, mask):
        seen = mask if name == "whole" else seen  # columns of tokens still to come
        arguments = (seen, positions[:, start:end], past, BATCH, end - start)
        for i, (window, create) in enumerate([(None, create_causal_mask), (WINDOW, create_sliding_window_causal_mask)]):
            built = Visibility.build(*arguments, i, window, torch.device("cpu"))
            expected = create(
                config, torch.empty(BATCH, end - start, 0), seen, past, position_ids=positions[:, start:end]
            )
            assert torch.equal(built.block(slice(None)).expand_as(expected), expected == 0)
            assert torch.equal(built.block(slice(1, 3)).expand_as(expected[:, :, 1:3]), expected[:, :, 1:3] == 0)
        if past is not None:
            for i in range(2):
                past.update(*2 * (torch.zeros(BATCH, KEY_HEADS, end - start, SIZE),), i)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_row_does_not_know_what_comes_later(vectors: dict[str, Tensor], statistic: str) -> None:
    """Attention received does: its recorded values change when tokens are appended."""
    whole = row_statistics(vectors["query"], vectors["key"], 1.0, visibility_of(None, 10), statistic)
    query, key = vectors["query"][:, :, :6], vectors["key"][:, :, :6]
    prefix = row_statistics(query, key, 1.0, visibility_of(None, 6), statistic)
    torch.testing.assert_close(whole[:, :6], prefix, **EXACT)
    assert (vectors["leaky_col_mean"][:, :6] - vectors["leaky_col_mean_prefix6"]).abs().max() > 0.01


@pytest.mark.parametrize("statistic", STATISTICS)
def test_block_size_changes_nothing(statistic: str) -> None:
    length = 260
    query, key = random_states(length, seed=8)
    padding = torch.ones(BATCH, length, dtype=torch.long)
    padding[1, :140] = 0
    visibility = visibility_of(padding, length, window=150)
    whole = row_statistics(query, key, 0.7, visibility, statistic, block_size=length)
    for block_size in (7, 128, 1000):
        rows = row_statistics(query, key, 0.7, visibility, statistic, block_size=block_size)
        torch.testing.assert_close(rows, whole, **EXACT)
    torch.testing.assert_close(row_statistics(query, key, 0.7, visibility, statistic), whole, **EXACT)


def test_grouped_key_heads_equal_repeated_ones() -> None:
    query, key = random_states(seed=9)
    visibility = visibility_of(None, LENGTH)
    for statistic in STATISTICS:
        grouped = row_statistics(query, key, 0.7, visibility, statistic)
        repeated = row_statistics(query, key.repeat_interleave(2, dim=1), 0.7, visibility, statistic)
        torch.testing.assert_close(grouped, repeated, **EXACT)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, statistic: str) -> None:
    query, key = random_states(seed=10, dtype=dtype)
    visibility = visibility_of(None, LENGTH)
    expected = row_statistics(query.float(), key.float(), 0.7, visibility, statistic)
    computed = row_statistics(query, key, 0.7, visibility, statistic)
    assert computed.dtype == torch.float32 and torch.equal(computed, expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_statistics(query, key, 0.7, visibility, statistic), expected)


def test_large_logits_neither_overflow_nor_lose_the_row() -> None:
    query, key = random_states(seed=11, dtype=torch.float32)
    for statistic in STATISTICS:
        computed = row_statistics(query, key, 1e4, visibility_of(LEFT_PADDED, LENGTH), statistic)
        assert computed.isfinite().all() and (computed >= 0).all() and (computed <= 1 + 1e-6).all()


def test_no_gradient_reaches_the_attention() -> None:
    query, key = (states.requires_grad_() for states in random_states(seed=12))
    for statistic in STATISTICS:
        assert not row_statistics(query, key, 0.7, visibility_of(None, LENGTH), statistic).requires_grad


@pytest.mark.parametrize("mask", [None, LEFT_PADDED], ids=["packed or not", "mask"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_one_graph_when_compiled(statistic: str, mask: Tensor | None) -> None:
    def importance(query: Tensor, key: Tensor) -> Tensor:
        return row_statistics(query, key, 0.7, visibility_of(mask, LENGTH, WINDOW), statistic, block_size=5)

    torch.compiler.reset()
    query, key = random_states(seed=13)
    compiled = torch.compile(importance, fullgraph=True, backend="eager")(query, key)
    torch.testing.assert_close(compiled, importance(query, key), **EXACT)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_received_attention_is_a_plain_loop_over_columns(padding: str) -> None:
    num_tokens, heads, head_dim = 24, 4, 6
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, heads, num_tokens, head_dim, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, num_tokens, head_dim, generator=generator, dtype=torch.float64)
    real = torch.ones(2, num_tokens, dtype=torch.bool)
    if padding == "left":
        real[1, :5] = False
    positions = torch.arange(num_tokens)
    visibility = Visibility(positions, positions, real_keys=real)
    actual = received_attention(query, key, 0.4, visibility, block_size=7)
    for row in range(2):
        received, uniform, later = (torch.zeros(num_tokens, dtype=torch.float64) for _ in range(3))
        for t in range(num_tokens):
            keys = [s for s in range(t + 1) if real[row, s]]
            if not real[row, t]:
                continue
            for head in range(heads):
                logits = torch.stack([0.4 * query[row, head, t] @ key[row, head // 2, s] for s in keys])
                received[keys] += logits.softmax(0) / heads
            uniform[keys] += 1 / len(keys)
            later[[s for s in keys if s < t]] += 1
        expected = torch.where(later >= 16, received / uniform, torch.nan)
        assert 0 < expected.isfinite().sum() < num_tokens
        torch.testing.assert_close(actual[row], expected, equal_nan=True)


def test_received_attention_needs_a_whole_sequence() -> None:
    query, key = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 30, 4)
    assert received_attention(query, key, 1.0, Visibility(torch.tensor([29]), torch.arange(30))) is None
