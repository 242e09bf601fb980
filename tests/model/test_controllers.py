"""The budget controller alone, in closed loop with simulated routers, and counted by real models."""

import copy
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model.controllers import CALLS_WITHOUT_UPDATE, BudgetController, BudgetOptions, gaussian_threshold
from tests.tiny import tiny_config, tiny_model, tokens

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
Plant = Callable[[float], float]  # from a threshold to the experts that it makes a token use


def controller(num_experts: int, initial: float, **options: Any) -> BudgetController:
    return BudgetController(BudgetOptions(**options), [num_experts], [initial])


def standardised_logits(num_experts: int, num_tokens: int = 2000, seed: int = 1) -> Tensor:
    """(T, E) Gaussian logits of mean 0 and variance 1 in each row, the largest first."""
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    logits = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
    return logits.sort(-1, descending=True).values


def mean_experts(logits: Tensor, p: float, theta: float = 1.0) -> float:
    """Experts that a token needs for its probabilities, the largest first, to exceed p."""
    mass = (theta * logits).softmax(-1).cumsum(-1)[:, :-1]
    return 1 + (mass <= p).sum(-1).float().mean().item()


def run(loop: BudgetController, plant: Plant, p: float, num_updates: int) -> tuple[list[float], list[float]]:
    """The experts used before, and the thresholds after, each update."""
    used, thresholds = [], []
    for _ in range(num_updates):
        used.append(plant(p))
        (p,) = loop.step(used[-1:])
        thresholds.append(p)
    return used, thresholds


def test_trace_of_the_specification() -> None:
    loop = controller(4, 0.5, target=2, gain_p=0.2, gain_i=0.1)
    trace = [
        (1.2, 0.200, 0.560000),
        (1.6, 0.300, 0.550000),
        (2.4, 0.200, 0.500000),
        (2.1, 0.175, 0.512500),
        (2.0, 0.175, 0.517500),
    ]
    for used, integral, threshold in trace:
        assert loop.step([used]) == [pytest.approx(threshold, abs=1e-7)]
        assert loop.integral.item() == pytest.approx(integral, abs=1e-7)


@PROPERTY
@given(used=st.lists(st.floats(1, 8), min_size=1, max_size=30), gain_p=st.floats(0, 0.1), gain_i=st.floats(0, 0.02))
def test_the_positional_form(used: list[float], gain_p: float, gain_i: float) -> None:
    """`p_0 + gain_p e_t + gain_i sum of all e`, not steps that are added to the threshold before."""
    loop = controller(8, 0.5, target=3, gain_p=gain_p, gain_i=gain_i, p_min=0)
    errors = [(3 - mean) / 8 for mean in used]
    for mean, error, total in zip(used, errors, accumulate(errors), strict=True):
        expected = 0.5 + gain_p * error + gain_i * total
        assert 0 < expected < 1  # no bound takes part
        assert loop.step([mean]) == [pytest.approx(expected, abs=1e-6)]


SIZES = [(8, 2), (16, 2), (64, 8)]


@pytest.mark.parametrize("start", [0.2, 0.5])
@pytest.mark.parametrize(("num_experts", "target"), SIZES)
def test_closed_loop_meets_the_target_within_30_updates(num_experts: int, target: int, start: float) -> None:
    batches = iter(range(60))

    def plant(p: float) -> float:
        return mean_experts(standardised_logits(num_experts, 500, seed=next(batches)), p)

    used, _ = run(controller(num_experts, start, target=target), plant, start, 60)
    assert max(abs(mean - target) for mean in used[30:]) < 0.05 * target


@pytest.mark.parametrize(("num_experts", "target"), SIZES)
def test_closed_loop_follows_a_scale_that_grows(num_experts: int, target: int) -> None:
    logits, scales = standardised_logits(num_experts, 500), iter(torch.linspace(1, 3, 1000).tolist())
    used, thresholds = run(
        controller(num_experts, 0.5, target=target), lambda p: mean_experts(logits, p, next(scales)), 0.5, 1000
    )
    assert max(abs(mean - target) for mean in used[30:]) < 0.12 * target
    assert thresholds[-1] > thresholds[30] + 0.1  # sharper probabilities need a higher threshold


def test_gains_beyond_the_stability_bound_oscillate_from_one_expert_to_all() -> None:
    """The loop is stable below `gamma (gain_p + gain_i / 2) = 1`, with gamma about 0.56 for two of eight experts."""
    logits = standardised_logits(8)
    for gain, stable in ((0.5, True), (2.0, False)):
        loop = controller(8, 0.5, target=2, gain_p=gain, gain_i=gain)
        used, _ = run(loop, lambda p: mean_experts(logits, p), 0.2, 100)
        assert (max(abs(mean - 2) for mean in used[50:]) < 0.1) == stable
        if not stable:
            assert min(used[50:]) < 1.2 and max(used[50:]) > 6


def test_weak_gains_are_slow() -> None:
    logits = standardised_logits(8)
    loop = controller(8, 0.2, target=2, gain_p=0.1, gain_i=0.02)
    used, _ = run(loop, lambda p: mean_experts(logits, p), 0.2, 200)
    assert abs(used[100] - 2) > 0.1


@pytest.mark.parametrize(
    ("stuck_at", "target", "bound"),
    [(1.0, 2.0, 1.0), (1.0, 2.0, 0.9), (8.0, 2.0, 0.01), (8.0, 2.0, 0.2)],
    ids=["too few", "too few, p_max", "too many", "too many, p_min"],
)
def test_an_unreachable_target_leaves_the_threshold_at_its_bound(stuck_at: float, target: float, bound: float) -> None:
    """The integral stays where it was when the bound was reached, so that the loop recovers at once."""
    logits = standardised_logits(8)
    options = {"target": target, "p_max": bound} if stuck_at < target else {"target": target, "p_min": bound}
    loop = controller(8, 0.5, **options)
    _, thresholds = run(loop, lambda p: stuck_at, 0.5, 20)
    saturated = loop.integral.item()
    _, thresholds = run(loop, lambda p: stuck_at, thresholds[-1], 500)
    assert set(thresholds) == {bound}
    assert loop.integral.item() == saturated and abs(saturated) < 2
    used, thresholds = run(loop, lambda p: mean_experts(logits, p), bound, 30)
    assert (thresholds[0] < bound) if stuck_at < target else (thresholds[0] > bound)
    assert abs(used[-1] - target) < 0.05 * target


@pytest.mark.parametrize(("target", "bounds", "expected"), [(0.5, (0.05, 1.0), 0.05), (8.0, (0.01, 0.6), 0.6)])
def test_targets_outside_of_what_the_bounds_allow(target: float, bounds: tuple[float, float], expected: float) -> None:
    logits = standardised_logits(8)
    loop = controller(8, 0.4, target=target, p_min=bounds[0], p_max=bounds[1])
    _, thresholds = run(loop, lambda p: mean_experts(logits, p), 0.4, 200)
    assert thresholds[-1] == expected
    assert abs(loop.integral.item()) < 2


def test_each_layer_meets_the_target_by_its_own_threshold() -> None:
    thetas = (0.5, 1.0, 2.5)
    logits = [standardised_logits(8, seed=layer) for layer in range(3)]
    used = {}
    for scope in ("layer", "global"):
        loop = BudgetController(BudgetOptions(target=2, scope=scope), [8] * 3, [0.5] * 3)
        assert loop.integral.shape == ((3,) if scope == "layer" else ())
        thresholds = [0.5] * 3
        for _ in range(60):
            used[scope] = [mean_experts(*plant) for plant in zip(logits, thresholds, thetas, strict=True)]
            thresholds = loop.step(used[scope])
        assert len(set(thresholds)) == (3 if scope == "layer" else 1)
    assert used["layer"] == [pytest.approx(2, rel=0.05)] * 3
    assert sum(used["global"]) / 3 == pytest.approx(2, rel=0.05)
    assert used["global"][0] > 2.5 and used["global"][2] < 1.5


def test_a_layer_at_its_bound_does_not_stop_the_others() -> None:
    loop = BudgetController(BudgetOptions(target=7), [8, 8], [0.9, 0.5])
    logits, thresholds = standardised_logits(8), [0.9, 0.5]
    for _ in range(60):
        used = [mean_experts(logits, threshold, 0.7) for threshold in thresholds]
        thresholds = loop.step(used)
    assert sum(used) / 2 == pytest.approx(7, rel=0.05)


@pytest.mark.parametrize(
    ("num_experts", "target", "expected"),
    [
        (4, 2, 0.747),
        (8, 1.5, 0.374),
        (8, 2, 0.508),
        (16, 2, 0.332),
        (16, 4, 0.572),
        (32, 4, 0.390),
        (64, 8, 0.416),
        (128, 16, 0.428),
    ],
)
def test_initial_threshold_of_gaussian_logits(num_experts: int, target: float, expected: float) -> None:
    threshold = gaussian_threshold(num_experts, target)
    assert threshold == pytest.approx(expected, abs=0.01)
    assert mean_experts(standardised_logits(num_experts), threshold) == pytest.approx(target, rel=0.03)


def test_initial_threshold_does_not_depend_on_where_and_in_what_dtype_a_model_is_built() -> None:
    expected = gaussian_threshold(8, 2)
    state = torch.get_rng_state()
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            assert gaussian_threshold.__wrapped__(8, 2) == expected
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert gaussian_threshold.__wrapped__(8, 2) == expected
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0}, "target must be a finite number above 0"),
        ({"target": float("inf")}, "target must be a finite number above 0"),
        ({"target": "8"}, "'target'"),
        ({"gain_p": -0.1}, "gain_p must be"),
        ({"gain_i": float("nan")}, "gain_i must be"),
        ({"p_min": 0.5, "p_max": 0.4}, "p_min and p_max must be in order"),
        ({"p_min": -0.1}, "p_min and p_max must be in order"),
        ({"p_max": 1.5}, "p_min and p_max must be in order"),
        ({"scope": "model"}, "'scope'"),
        ({"targets": 2}, "targets"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config({"method": "dtop_p", "controller": options})


@pytest.mark.parametrize("selector", ["top_k", "importance"])
def test_a_selector_without_a_threshold_is_refused(selector: str) -> None:
    with pytest.raises(ValueError, match="moves a threshold"):
        tiny_config({"selector": selector, "controller": "budget"})


def one_update(model: DynMoeForCausalLM, *batches: dict[str, Tensor]) -> dict[int, float]:
    """The thresholds after one optimizer step of a copy of the model on these micro-batches."""
    model = copy.deepcopy(model).train()
    for batch in batches:
        model(**batch, labels=batch["input_ids"]).loss.backward()
    model.update_controllers()
    return model.thresholds()


def padded_batch() -> dict[str, Tensor]:
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, :7] = 0
    mask[3, :10] = 0
    return {"input_ids": tokens(4, 12), "attention_mask": mask}


def test_only_real_tokens_are_counted() -> None:
    model = tiny_model({"method": "dtop_p", "controller": {"target": 3.5}})
    batch = padded_batch()
    routings = [routing for routing in model(**batch, output_routing=True).routing if routing is not None]
    real = batch["attention_mask"].flatten().bool()
    used = torch.stack([routing.num_selected[real].float().mean() for routing in routings]).mean().item()
    error = (3.5 - used) / 8
    expected = gaussian_threshold(8, 3.5) + 0.3 * error + 0.3 * error
    assert abs(error) > 1e-3
    assert one_update(model, batch) == {layer: pytest.approx(expected, abs=1e-6) for layer in (0, 2)}
    garbage = batch["input_ids"].where(batch["attention_mask"].bool(), 5)
    assert one_update(model, batch | {"input_ids": garbage}) == one_update(model, batch)


def test_two_accumulated_micro_batches_are_one_batch() -> None:
    model, batch = tiny_model({"method": "dtop_p", "controller": {"scope": "layer"}}), padded_batch()
    # The second half has fewer real tokens, so the mean of two means would be another number.
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    whole = one_update(model, batch)
    assert whole[0] != whole[2]
    assert one_update(model, *halves) == pytest.approx(whole, abs=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_counts_once(use_reentrant: bool) -> None:
    model, batch = tiny_model("dtop_p"), padded_batch()
    expected = one_update(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert one_update(model, batch) == expected


def test_only_training_passes_are_counted() -> None:
    model = tiny_model("dtop_p")
    before = model.thresholds()
    model(tokens(2, 8), labels=tokens(2, 8)).loss.backward()
    model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        model.train()(tokens(2, 8))
    with torch.inference_mode():
        model(tokens(2, 8))
    assert model.model.controller.counts is None
    model.update_controllers()
    assert model.thresholds() == before and model.model.controller.integral == 0
    model(tokens(2, 8))
    assert model.thresholds() == before  # the pass itself moves nothing
    model.update_controllers()
    assert model.thresholds() != before


def test_a_pass_without_real_tokens_moves_nothing() -> None:
    model = tiny_model("dtop_p").train()
    before = model.thresholds()
    model(tokens(1, 4), attention_mask=torch.zeros(1, 4, dtype=torch.long))
    model.update_controllers()
    assert model.thresholds() == before and model.model.controller.integral == 0


def test_a_budget_of_pairs_in_a_cartesian_layer() -> None:
    routing = {"method": "dtop_p", "experts": "cartesian", "controller": {"target": 6, "scope": "layer"}}
    model, batch = tiny_model(routing), padded_batch()
    real = batch["attention_mask"].flatten().bool()
    first, second, *_ = (routing for routing in model(**batch, output_routing=True).routing if routing is not None)
    pairs = (first.num_selected * second.num_selected)[real].float().mean().item()
    # Sub-experts of each bank, at first, as if the banks shared the target: 2.45 of 8 each.
    start = gaussian_threshold(8, 6**0.5)
    assert model.thresholds() == {layer: pytest.approx(start) for layer in (0, 2)}
    error = (6 - pairs) / 64
    assert abs(error) > 1e-3
    assert one_update(model, batch)[0] == pytest.approx(start + 0.6 * error, abs=1e-6)
    for block in model.moe_blocks():
        assert block.selector.threshold == pytest.approx(start)


def test_a_forgotten_update_is_noticed() -> None:
    loop = controller(8, 0.5)
    for _ in range(CALLS_WITHOUT_UPDATE - 1):
        loop.count([torch.tensor(4)], 2)
    with pytest.warns(UserWarning, match="update_controllers"):
        loop.count([torch.tensor(4)], 2)
    assert loop.close_step() == [pytest.approx(0.5)]  # two experts a token


def test_counting_compiles_once() -> None:
    model, batches = tiny_model("dtop_p", "batched_mm").train(), [tokens(2, 8, seed=number) for number in range(12)]
    expected = one_update(model, *({"input_ids": batch} for batch in batches))
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in batches:
        compiled(batch)
    assert len(graphs) <= 2  # the first pass of a step and the others
    model.update_controllers()
    assert model.thresholds() == pytest.approx(expected, abs=1e-6)
