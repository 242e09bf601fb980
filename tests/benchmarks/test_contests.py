"""Every engine enters every case, and nobody is measured whose result is wrong."""

import pytest
import torch
from torch import Tensor, nn

from dynmoe_hf.benchmarks import steps
from dynmoe_hf.benchmarks.cases import CASES, run_case
from dynmoe_hf.benchmarks.contest import Contest
from dynmoe_hf.benchmarks.equality import WrongResult, failures_of
from dynmoe_hf.benchmarks.peers import INDEXING, entrants_of
from dynmoe_hf.benchmarks.settings import Settings
from dynmoe_hf.benchmarks.shapes import FULL, variable
from dynmoe_hf.model.compat import ExpertsInterface
from dynmoe_hf.model.dispatch import ENGINES, eager_experts
from dynmoe_hf.model.methods import METHODS

QUICK = Settings(rounds=1, quick=True)
PADDED_AND_FLAT = {f"{engine}_{form}" for engine in ("grouped_mm", "batched_mm") for form in ("padded", "flat")}
LOOPS = {"transformers_eager", "module_loop", "official_loop"}


@pytest.fixture
def plant(monkeypatch):
    """Register an engine of ours under the name `planted` for one test."""

    def register(engine):
        monkeypatch.setitem(ENGINES, "planted", engine)
        monkeypatch.setitem(ExpertsInterface._global_mapping, "planted", engine)

    return register


def contests(case: str, dtype: str = "float32") -> list[Contest]:
    return [build() for build in CASES[case].plan(Settings((dtype,), quick=True))]


def expected_names(case: str) -> set[str]:
    """Everybody who has to be measured or left out for a reason."""
    own = set(ENGINES) - {"reference"}
    if case == "mean_k":
        return {f"{name} k={k}" for name in own | {"grouped_mm_padded", "grouped_mm_flat"} for k in (1, 2, 4)}
    if case == "step":
        families = ("dynmoe", "mixtral", "olmoe", "qwen3_moe")
        return {"llama"} | {f"{family} {engine}" for family in families for engine in own | {"eager", "grouped_mm"}}
    return (
        own
        | {
            "layer": {"grouped_mm", "batched_mm", "dense", "gemm"} | LOOPS,
            "variable_k": {"dense", "gemm"} | LOOPS | PADDED_AND_FLAT,
            "decode": {"grouped_mm", "batched_mm", "stream"} | LOOPS,
            "memory": LOOPS,
        }[case]
    )


@pytest.mark.parametrize("case", ["layer", "variable_k", "decode", "memory", "mean_k", "step"])
def test_every_engine_enters_every_case(case: str, plant) -> None:
    plant(eager_experts)  # an engine that nobody has heard of
    for contest in contests(case):
        names = {entrant.name for entrant in contest.entrants}
        assert not names & set(contest.left_out)
        assert expected_names(case) <= names | set(contest.left_out)
        assert {entrant.yardstick or contest.yardstick for entrant in contest.entrants} <= names
        # Only the experts of transformers may be beyond an engine of ours.
        assert all(name.split()[0] in steps.TRANSFORMERS_FAMILIES for name in contest.left_out), contest.left_out


def test_the_registry_has_every_method() -> None:
    plan = CASES["methods"].plan(QUICK)
    assert [build.args[0] for build in plan] == [name for name in METHODS if name != "top_k"]
    (contest,) = (build() for build in plan if build.args[0] == "top_p")
    assert {entrant.name for entrant in contest.entrants} == {"top_k", "top_p"}
    assert contest.notes["experts per token, top_k"] == 2


def wrong_output(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return 1.2 * eager_experts(experts, hidden, ids, weights)


def wrong_gradient(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return eager_experts(experts, hidden, ids, weights) + 0.2 * (hidden - hidden.detach())


def slightly_wrong(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return 1.0001 * eager_experts(experts, hidden, ids, weights)


@pytest.mark.parametrize(
    ("case", "engine", "dtype"),
    [
        ("layer", wrong_output, "bfloat16"),
        ("layer", wrong_gradient, "bfloat16"),
        ("layer", slightly_wrong, "float32"),
        ("variable_k", wrong_gradient, "float32"),
        ("mean_k", wrong_gradient, "float32"),
        ("memory", slightly_wrong, "float32"),
        ("decode", slightly_wrong, "float32"),
        ("step", wrong_gradient, "float32"),
    ],
)
def test_a_wrong_entrant_ends_the_run(case: str, engine, dtype: str, plant) -> None:
    plant(engine)
    with pytest.raises(WrongResult, match="planted is wrong in"):
        next(run_case(case, Settings((dtype,), 1, quick=True)))


def test_an_engine_that_is_wrong_only_for_many_tokens_is_caught(plant, monkeypatch) -> None:
    """The reference is computed on a few tokens; the loop over modules on all of them."""
    monkeypatch.setattr("dynmoe_hf.benchmarks.layers.CHECK_TOKENS", 4)

    def wrong_for_many(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (wrong_output if hidden.shape[0] > 20 else eager_experts)(experts, hidden, ids, weights)

    plant(wrong_for_many)
    with pytest.raises(WrongResult, match="planted"):
        contests("layer")


def test_an_engine_that_cannot_run_is_reported(plant) -> None:
    def refuses(experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError("not on this machine")

    plant(refuses)
    for contest in contests("layer"):
        assert contest.left_out == {"planted": "NotImplementedError: not on this machine"}
        assert "planted" not in {entrant.name for entrant in contest.entrants}


def test_nan_is_wrong_and_so_is_a_plain_entrant() -> None:
    exact = {"output": torch.tensor([1.0, 2.0]).double()}
    right, nan, off = (
        lambda values=values: {"output": torch.tensor(values)} for values in ([1, 2.0], [1, torch.nan], [1, 3.0])
    )
    assert failures_of({"plain": right, "other": right}, exact, "plain", "here") == {}
    with pytest.raises(WrongResult, match="other is wrong in here: output"):
        failures_of({"plain": right, "other": nan}, exact, "plain", "here")
    with pytest.raises(WrongResult, match="plain"):
        failures_of({"plain": off}, exact, "plain", "here")


def test_who_would_fill_the_memory_is_left_out_with_the_reason() -> None:
    builders, left_out = entrants_of(FULL["a"], torch.float32)
    assert set(left_out) == {"batched_mm"} and "24 GiB" in left_out["batched_mm"]
    _, left_out = entrants_of(variable(FULL["a"], 4, 1.75), torch.float32)
    assert set(left_out) == {"batched_mm_padded", "batched_mm_flat"}
    _, left_out = entrants_of(FULL["b"], torch.float32)
    assert set(left_out) == {"batched_mm", *INDEXING}
    _, left_out = entrants_of(FULL["b"], torch.bfloat16, trains=False)
    assert set(left_out) == {"batched_mm"}
