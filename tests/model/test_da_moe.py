"""DA-MoE: as many experts as a token's attention is sharp (Aghdam et al. 2024, arXiv 2409.06669).

The importance itself is tested in test_row_statistics.py; here is what the selector and the model make of it.
"""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model import attention
from dynmoe_hf.model.expert_selectors import Importance, ImportanceOptions, TopK, TopKOptions
from dynmoe_hf.model.routing import Routing, RoutingContext
from dynmoe_hf.model.row_statistics import STATISTICS, Visibility
from tests.model.test_row_statistics import row_by_hand
from tests.tiny import ENGINES, greedy, tiny_config, tiny_model, tokens

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
CLOSE = {"rtol": 0.0, "atol": 1e-5}
LENGTH = 12
# Layer 0 sees everything, the other sparse layer four tokens.
WINDOWS: dict[str, Any] = {
    "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
}
CAUSAL = (*STATISTICS, "learned")
LEFT_PADDED = torch.tensor([[1] * LENGTH, [0] * 5 + [1] * (LENGTH - 5)])


def da_moe(statistic: str = "row_max", **options: Any) -> dict[str, Any]:
    losses = {"importance": 0.01 * (statistic == "learned")}
    return {"method": "da_moe", "selector": {"statistic": statistic, **options}, "losses": losses}


def select(logits: Tensor, importance: Tensor, **options: Any) -> Routing:
    config = DynMoeConfig(num_experts=logits.shape[-1], routing=da_moe(**options))
    return Importance(ImportanceOptions(**options), config)(logits, RoutingContext(0, importance=importance))


def random_logits(num_tokens: int, num_experts: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64).to(dtype)


def causal_model(statistic: str, engine: str = "eager", **changes: Any) -> DynMoeForCausalLM:
    model = tiny_model(da_moe(statistic), engine, **changes)
    for block in model.moe_blocks():
        if statistic == "learned":  # starts at zero, where all tokens are alike
            torch.nn.init.normal_(block.selector.importance_head.weight, std=0.2)
    return model


class Seen:
    """What each MoE layer was given and chose in the calls inside a `with` block: (B, S) importance and K, by layer."""

    def __init__(self, model: DynMoeForCausalLM) -> None:
        self.model = model
        self.importance: dict[int, list[Tensor]] = {}
        self.num_experts: dict[int, list[Tensor]] = {}

    def __enter__(self) -> "Seen":
        self.hooks = [block.register_forward_hook(self._read) for block in self.model.moe_blocks()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _read(self, block: Any, args: tuple[Tensor, RoutingContext], output: tuple[Tensor, Routing]) -> None:
        shape = args[0].shape[:2]
        layer = block.layer_idx if block.bank is None else (block.layer_idx, block.bank)
        if block.statistic in STATISTICS:
            self.importance.setdefault(layer, []).append(args[1].importance.view(shape))
        self.num_experts.setdefault(layer, []).append(output[1].num_selected.view(shape))


def run(model: DynMoeForCausalLM, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    """Logits of one call; importance and number of experts of each MoE layer."""
    with Seen(model) as seen:
        logits = model(*args, **kwargs).logits
    return logits, *({i: torch.cat(parts, 1) for i, parts in f.items()} for f in (seen.importance, seen.num_experts))


@PROPERTY
@given(
    importance=st.lists(st.integers(0, 64), min_size=1, max_size=20),
    num_experts=st.integers(1, 16),
    scale=st.integers(1, 12),
    ceil_eps=st.sampled_from([0.0, 0.25]),
    data=st.data(),
)
def test_number_of_experts(
    importance: list[int], num_experts: int, scale: int, ceil_eps: float, data: st.DataObject
) -> None:
    """In 64ths and quarters, so that float32 is exact and the reference can count in fractions."""
    k_max = data.draw(st.integers(1, num_experts))
    k_min = data.draw(st.integers(1, k_max))
    options = {"scale": scale / 4, "k_min": k_min, "k_max": k_max, "ceil_eps": ceil_eps}
    routing = select(random_logits(len(importance), num_experts), torch.tensor(importance) / 64, **options)
    exact = [Fraction(scale, 4) * Fraction(part, 64) * num_experts - Fraction(ceil_eps) for part in importance]
    assert routing.num_selected.tolist() == [min(max(ceil(number), k_min), k_max) for number in exact]
    assert routing.expert_ids.shape == (len(importance), k_max)


@pytest.mark.parametrize("num_experts", [8, 12, 16])
def test_uniform_rows_of_n_keys_give_exactly_a_share_of_the_experts(num_experts: int) -> None:
    """Rounding errors of the attention must not add an expert to E / n."""
    noise = 1e-6 * torch.linspace(-1, 1, 41)
    for n in (n for n in range(1, num_experts + 1) if num_experts % n == 0):
        routing = select(random_logits(41, num_experts), 1 / n + noise)
        assert (routing.num_selected == num_experts // n).all()


@PROPERTY
@given(seed=st.integers(0, 2**20), scale=st.floats(0.5, 2.0), k_min=st.integers(1, 3))
def test_choices_are_nested_in_the_importance(seed: int, scale: float, k_min: int) -> None:
    importance = torch.rand(2, 30, generator=torch.Generator().manual_seed(seed)).sort(dim=0).values
    logits = random_logits(30, seed=seed)
    smaller, larger = (select(logits, part, scale=scale, k_min=k_min).selected() for part in importance)
    assert (smaller <= larger).all() and (smaller < larger).any()


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_weights_sum_to_the_chosen_mass_or_to_one(norm_topk_prob: bool) -> None:
    logits = random_logits(50)
    routing = select(logits, torch.linspace(0, 1, 50), norm_topk_prob=norm_topk_prob)
    assert set(routing.num_selected.tolist()) == set(range(1, 9))
    mass = (logits.softmax(-1) * routing.selected()).sum(-1)
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones_like(mass) if norm_topk_prob else mass)
    assert (routing.weights[~routing.used] == 0).all()
    every = select(logits, torch.ones(50), norm_topk_prob=norm_topk_prob)
    torch.testing.assert_close(every.weights, logits.softmax(-1).gather(1, every.expert_ids))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_equal_bounds_select_as_top_k_bit_for_bit(k: int, norm_topk_prob: bool) -> None:
    logits = random_logits(40, dtype=torch.float32)
    options = TopKOptions(k=k, norm_topk_prob=norm_topk_prob)
    plain = TopK(options, DynMoeConfig(num_experts=8))(logits, RoutingContext(0))
    importance = torch.rand(40, generator=torch.Generator().manual_seed(0))
    ours = select(logits, importance, k_min=k, k_max=k, norm_topk_prob=norm_topk_prob)
    for first, second in zip(ours[:4], plain[:4], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_equal_bounds_compute_as_top_k_bit_for_bit(engine: str, norm_topk_prob: bool) -> None:
    """Three experts: their sum depends on its order, which differs between the two forms of a call."""
    content, results = tokens(2, 9), []
    for name, options in (("top_k", {"k": 3}), ("importance", {"k_min": 3, "k_max": 3})):
        selector = {"type": name, "norm_topk_prob": norm_topk_prob, **options}
        model = tiny_model({"selector": selector}, engine, balance_normalize=False)
        output = model(content, labels=content)
        output.loss.backward()
        results.append(([output.logits, output.loss], [parameter.grad for parameter in model.parameters()]))
    (outputs, gradients), (other_outputs, other_gradients) = results
    assert all(map(torch.equal, outputs, other_outputs))
    # Threads add up gradients in any order.
    torch.testing.assert_close(gradients, other_gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("renormalised", [False, True])
def test_a_single_expert_trains_the_gate_unless_renormalised(renormalised: bool) -> None:
    model = tiny_model(da_moe(k_max=1, norm_topk_prob=renormalised) | {"losses": {"load_balance": 0.0}})
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    for block in model.moe_blocks():
        size = block.gate.weight.grad.abs().max()
        assert size < 1e-7 if renormalised else size > 1e-4


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ({"statistic": "col_mean"}, "'col_mean' is refused in a decoder"),
        ({"statistic": "row_min"}, "Unknown statistic 'row_min'. Did you mean 'row_max'"),
        ({"scale": 0.0}, "scale must be"),
        ({"k_min": 0}, "k_min must be at least 1"),
        ({"k_min": 4, "k_max": 3}, "k_min=4 must not exceed"),
        ({"k_max": 9}, "k_max must be between 1 and num_experts"),
        ({"ceil_eps": 1.0}, "ceil_eps must be"),
    ],
)
def test_refused_options(selector: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynMoeConfig(num_experts=8, routing={"method": "da_moe", "selector": selector})


@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["full", "window"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("first", "second"), [*zip(STATISTICS, STATISTICS, strict=True), ("row_max", "self")])
def test_importance_is_read_from_the_attention_of_the_same_block(
    first: str, second: str, padded: bool, windows: dict[str, Any]
) -> None:
    """Against the probabilities that eager attention returns; each layer may have a statistic of its own."""
    own = {2: {"selector": {"statistic": second}}}
    model = tiny_model(da_moe(first), layer_routing=own, attn_implementation="eager", **windows)
    mask = LEFT_PADDED if padded else torch.ones_like(LEFT_PADDED)
    with Seen(model) as seen:
        output = model(tokens(2, LENGTH), attention_mask=mask, output_attentions=True)
    for layer, statistic in ((0, first), (2, second)):
        window = windows.get("sliding_window", LENGTH) if layer == 2 else LENGTH
        for sequence, query in mask.nonzero().tolist():
            visible = [key for key in range(max(0, query - window + 1), query + 1) if mask[sequence, key]]
            rows = output.attentions[layer][sequence, :, query, visible].tolist()
            expected = sum(row_by_hand(row, statistic, len(visible) - 1) for row in rows) / len(rows)
            assert seen.importance[layer][0][sequence, query].item() == pytest.approx(expected, abs=1e-5)
            number = min(max(ceil(8 * expected - 1e-4), 1), 8)
            assert seen.num_experts[layer][0][sequence, query] == number
        assert (seen.num_experts[layer][0][mask == 0] == 0).all()


@pytest.mark.parametrize("statistic", STATISTICS)
def test_uniform_attention(statistic: str) -> None:
    """Queries of zero: the number of experts follows from the number of visible keys alone."""
    model = tiny_model(da_moe(statistic), **WINDOWS)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    _, _, chosen = run(model, tokens(2, LENGTH), attention_mask=LEFT_PADDED)
    for layer, window in ((0, LENGTH), (2, 4)):
        for sequence, padding in ((0, 0), (1, 5)):
            counts = [min(n, window) for n in range(1, LENGTH - padding + 1)]
            expected = {
                "row_max": [ceil(Fraction(8, n)) for n in counts],
                "row_max_norm": [1 for n in counts],
                "row_max_nosink": [1 if n == 1 else ceil(Fraction(8, n - 1)) for n in counts],
                "row_entropy": [1 if n == 1 else 8 for n in counts],
                "self": [ceil(Fraction(8, n)) for n in counts],
            }
            assert chosen[layer][sequence].tolist() == [0] * padding + expected[statistic]


def received_attention(
    query: Tensor, key: Tensor, scaling: float, visibility: Visibility, statistic: str = "", **_: Any
) -> Tensor:
    """What a decoder must not route by: the mean attention that the tokens from s on pay to s. One call, no cache."""
    visible = visibility.block(slice(None))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    probs = (query @ key.transpose(2, 3) * scaling).masked_fill(~visible, -torch.inf).softmax(-1)
    return (probs.sum(2) / visible.sum(2)).mean(1)


def check_that_nothing_looks_ahead(model: DynMoeForCausalLM, start: int = 7) -> None:
    """Other tokens from `start` on: everything before is the same to the last bit."""
    content, other = tokens(2, LENGTH), tokens(2, LENGTH)
    other[:, start:] = tokens(2, LENGTH - start, seed=9)
    first, second = (model(part, output_routing=True) for part in (content, other))
    (logits, *measured), (other_logits, *other_measured) = (run(model, part) for part in (content, other))
    assert not torch.equal(logits[:, start:], other_logits[:, start:])
    assert torch.equal(logits[:, :start], other_logits[:, :start]), "the logits look ahead"
    for before, after in zip(measured, other_measured, strict=True):
        for layer in before:
            assert torch.equal(before[layer][:, :start], after[layer][:, :start]), "the importance looks ahead"
    for before, after in zip(first.routing, second.routing, strict=True):
        if before is not None:
            ids = (routing.expert_ids.view(2, LENGTH, -1)[:, :start] for routing in (before, after))
            assert torch.equal(*ids), "the choice looks ahead"


@pytest.mark.parametrize("windows", [{}, WINDOWS], ids=["full", "window"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("statistic", CAUSAL)
def test_no_statistic_looks_ahead(statistic: str, implementation: str, windows: dict[str, Any]) -> None:
    """The reference engine multiplies the same shapes whatever is chosen, so equality can be exact."""
    model = causal_model(statistic, "reference", attn_implementation=implementation, **windows)
    check_that_nothing_looks_ahead(model)


def test_attention_received_would_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same check notices it. (The config refuses it: `test_refused_options`.)"""
    rows = [
        [[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.7, 0.2, 0.1, 0], [0.25, 0.25, 0.25, 0.25]],
        [[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.2, 0.2, 0.6, 0], [0.1, 0.1, 0.2, 0.6]],
    ]
    query, key = torch.tensor(rows).clamp_min(1e-30).log()[None], torch.eye(4)[None, None]
    for length, expected in ((4, [0.58125, 0.225, 0.2875, 0.425]), (3, [0.716667, 0.25, 0.35])):
        visibility = Visibility(torch.arange(length), torch.arange(length))
        received = received_attention(query[:, :, :length], key[:, :, :length], 1.0, visibility)
        torch.testing.assert_close(received, torch.tensor([expected]), **CLOSE)
    model = tiny_model("da_moe", "reference")
    monkeypatch.setattr(attention, "row_statistics", received_attention)
    with pytest.raises(AssertionError, match="looks? ahead"):
        check_that_nothing_looks_ahead(model)


@cache
def decoder(statistic: str) -> DynMoeForCausalLM:
    return causal_model(statistic, **WINDOWS)


@cache
@torch.no_grad()
def full_forward(statistic: str, padded: bool) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
    return run(decoder(statistic), tokens(2, LENGTH), attention_mask=LEFT_PADDED if padded else None)


def cached_calls(chunks: list[int], padded: bool, past: DynamicCache | StaticCache) -> Iterator[dict[str, Any]]:
    end = 0
    for size in chunks:
        start, end = end, end + size
        mask = LEFT_PADDED[:, :end] if padded else None
        yield {"input_ids": tokens(2, LENGTH)[:, start:end], "attention_mask": mask, "past_key_values": past}


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 7], [3, 1, 4, 2, 1, 1]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("statistic", CAUSAL)
@torch.no_grad()
def test_decoding_and_chunked_prefill_equal_the_full_forward(
    statistic: str, kind: str, padded: bool, chunks: list[int]
) -> None:
    model = decoder(statistic)
    sizes = {"config": model.config, "max_cache_len": LENGTH + 3}
    past = StaticCache(**sizes) if kind == "static" else DynamicCache(config=model.config)
    with Seen(model) as seen:
        logits = torch.cat([model(**call, use_cache=True).logits for call in cached_calls(chunks, padded, past)], 1)
    expected, importance, chosen = full_forward(statistic, padded)
    real = LEFT_PADDED.bool() if padded else torch.ones_like(LEFT_PADDED, dtype=torch.bool)
    torch.testing.assert_close(logits[real], expected[real], **CLOSE)
    for layer in (0, 2):
        assert torch.equal(torch.cat(seen.num_experts[layer], 1), chosen[layer])
        assert chosen[layer][real].unique().numel() > 2
    for layer in importance:
        torch.testing.assert_close(torch.cat(seen.importance[layer], 1)[real], importance[layer][real], **CLOSE)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_generate_equals_the_full_forward(cache_implementation: str) -> None:
    """Greedy, from a left-padded batch; positions then start at the first real token."""
    model = decoder("row_max")
    prompt, mask = tokens(2, LENGTH), LEFT_PADDED
    settings_ = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(prompt, attention_mask=mask, cache_implementation=cache_implementation, **settings_)
    for row, padding in ((0, 0), (1, 5)):
        assert torch.equal(generated[row, padding:], greedy(model, prompt[row : row + 1, padding:], 5)[0])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@torch.no_grad()
def test_every_attention_implementation_gives_the_same_number_of_experts(implementation: str, padded: bool) -> None:
    mask = LEFT_PADDED if padded else torch.ones_like(LEFT_PADDED)
    models = [tiny_model("da_moe", attn_implementation=name, **WINDOWS) for name in ("eager", implementation)]
    with torch.compiler.set_stance("force_eager"):  # compiling flex attention takes half a minute
        results = [run(model, tokens(2, LENGTH), attention_mask=mask) for model in models]
    (expected, _, chosen), (logits, _, ours) = results
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], **CLOSE)
    assert all(torch.equal(ours[layer], chosen[layer]) for layer in (0, 2))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_packed_documents_route_as_if_alone(statistic: str, implementation: str) -> None:
    model = tiny_model(da_moe(statistic), attn_implementation=implementation, **WINDOWS)
    lengths = [[5, 4, 3], [2, 7, 3]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    content = tokens(2, LENGTH)
    logits, _, chosen = run(model, content, position_ids=positions, use_cache=False)
    for row, sizes in enumerate(lengths):
        for end, size in zip(torch.tensor(sizes).cumsum(0).tolist(), sizes, strict=True):
            part = slice(end - size, end)
            alone, _, chosen_alone = run(model, content[row : row + 1, part])
            torch.testing.assert_close(logits[row, part], alone[0], **CLOSE)
            for layer in (0, 2):
                assert torch.equal(chosen[layer][row, part], chosen_alone[layer][0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_dropout_leaves_the_importance_alone(implementation: str) -> None:
    """The first layer has the same queries and keys with and without it."""
    model = tiny_model("da_moe", attn_implementation=implementation, attention_dropout=0.5)
    expected, importance, chosen = run(model, tokens(2, LENGTH))
    model.train()
    torch.manual_seed(0)
    logits, dropped_importance, dropped = run(model, tokens(2, LENGTH))
    assert not torch.allclose(logits, expected, atol=1e-3)
    assert torch.equal(dropped_importance[0], importance[0]) and torch.equal(dropped[0], chosen[0])


def test_no_gradient_reaches_queries_and_keys_through_the_number_of_experts() -> None:
    """Attention that puts out nothing can reach the loss by the number of experts only."""
    model = tiny_model("da_moe").train()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    with Seen(model) as seen:
        model(tokens(2, LENGTH), labels=tokens(2, LENGTH)).loss.backward()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            assert projection.weight.grad is None or not projection.weight.grad.any()
    for layer in (0, 2):
        assert not seen.importance[layer][0].requires_grad
        assert seen.num_experts[layer][0].unique().numel() > 2
    assert all(block.gate.weight.grad.any() for block in model.moe_blocks())


@pytest.mark.parametrize("statistic", STATISTICS)
def test_grouped_key_heads_equal_repeated_ones(statistic: str) -> None:
    grouped = tiny_model(da_moe(statistic), num_key_value_heads=2)
    repeated = tiny_model(da_moe(statistic), num_key_value_heads=4)
    weights = grouped.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        weights[name] = weights[name].unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
    repeated.load_state_dict(weights)
    expected, _, chosen = run(repeated, tokens(2, LENGTH))
    logits, _, ours = run(grouped, tokens(2, LENGTH))
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert all(torch.equal(ours[layer], chosen[layer]) for layer in (0, 2))


@pytest.mark.parametrize("statistic", CAUSAL)
def test_a_batch_and_its_padding_change_no_number_of_experts(statistic: str) -> None:
    model = decoder(statistic)
    content = tokens(3, LENGTH)
    masks = torch.stack([torch.ones(LENGTH).long(), LEFT_PADDED[1], LEFT_PADDED[1].flip(0)])
    logits, _, chosen = run(model, content, attention_mask=masks)
    for row, mask in enumerate(masks.bool()):
        alone, _, chosen_alone = run(model, content[row : row + 1, mask])
        torch.testing.assert_close(logits[row, mask], alone[0], **CLOSE)
        for layer in (0, 2):
            assert torch.equal(chosen[layer][row, mask], chosen_alone[layer][0])


def test_both_banks_of_a_cartesian_layer_read_the_same_importance() -> None:
    routing = da_moe() | {"experts": {"type": "cartesian", "second_selector": {"k_max": 3}}}
    model = tiny_model(routing, num_shared_experts=1)
    _, importance, chosen = run(model, tokens(2, LENGTH))
    for layer in (0, 2):
        assert torch.equal(importance[layer, 0], importance[layer, 1])
        assert torch.equal(chosen[layer, 0].clamp(max=3), chosen[layer, 1])
    with pytest.raises(ValueError, match="second_selector cannot have another statistic"):
        tiny_config(da_moe() | {"experts": {"type": "cartesian", "second_selector": {"statistic": "self"}}})


def test_only_layers_that_ask_for_it_pay_for_the_statistic(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measured(query: Tensor, key: Tensor, scaling: float, visibility: Visibility, statistic: str) -> Tensor:
        asked.append(statistic)
        return query.new_ones(query.shape[0], query.shape[2])

    monkeypatch.setattr(attention, "row_statistics", measured)
    tiny_model("top_k")(tokens(2, 6))
    tiny_model("top_k", layer_routing={2: da_moe("self")})(tokens(2, 6))
    assert asked == ["self"]


@pytest.mark.parametrize("parts", [{"method": "da_moe"}, {"selector": {"type": "importance"}}], ids=["method", "part"])
def test_a_top_k_checkpoint_routes_by_importance_without_new_weights(parts: dict[str, Any], tmp_path) -> None:
    trained = tiny_model("top_k")
    assert trained.state_dict().keys() == tiny_model("da_moe").state_dict().keys()
    trained.save_pretrained(tmp_path)
    content = tokens(2, LENGTH)
    expected = tiny_model(da_moe(), num_experts_per_tok=8)
    expected.load_state_dict(trained.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, routing=parts, experts_implementation="eager").eval()
    trained_logits = trained(content).logits
    with trained.routing_override(**parts):
        overridden = trained(content).logits
    assert torch.equal(trained(content).logits, trained_logits)
    trained.set_routing(**parts)
    for logits in (loaded(content).logits, overridden, trained(content).logits):
        assert torch.equal(logits, expected(content).logits)
    assert loaded.config.routing["method"] == "da_moe" and loaded.config.num_experts_per_tok == 8
