"""Our DTop-p selector and controller against numbers computed apart from this package (`tests/vectors/README.md`)."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.controllers import BudgetController, BudgetOptions
from dynmoe_hf.model.expert_selectors import TopP, TopPOptions
from dynmoe_hf.model.routing import RoutingContext
from tests.recorded import FOLDER

FILE = FOLDER / "dtop_p_derived.safetensors"
# The eps of the standardisation, 1e-6, changes the probabilities by more than this.
TOLERANCES = {torch.float64: {"rtol": 0, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    with safe_open(FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.fixture(scope="module")
def described() -> dict[str, dict]:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()["json"])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("p", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("theta", [0.5, 1.0, 2.0])
def test_selector_grid(recorded: dict[str, Tensor], theta: float, p: float, dtype: torch.dtype) -> None:
    expected = {name: recorded[f"theta{theta}.p{p}.{name}"] for name in ("probs", "num_selected", "weights")}
    config = DynMoeConfig(num_experts=8, routing="dtop_p")
    selector = TopP(TopPOptions(p=p, norm_topk_prob=True, standardize=True), config)
    torch.nn.init.constant_(selector.logit_norm.theta, theta)
    routing = selector(recorded["in.logits"].to(dtype), RoutingContext(0))
    assert torch.equal(routing.num_selected, expected["num_selected"])
    assert torch.equal(routing.selected().bool(), expected["weights"] > 0)
    dense = torch.zeros(32, 9, dtype=dtype).scatter(1, routing.expert_ids, routing.weights.detach())[:, :8]
    torch.testing.assert_close(routing.probs, expected["probs"].to(dtype), **TOLERANCES[dtype])
    torch.testing.assert_close(dense, expected["weights"].to(dtype), **TOLERANCES[dtype])


def test_controller_trace(recorded: dict[str, Tensor], described: dict[str, dict]) -> None:
    settings = described["controller"]
    options = BudgetOptions(
        target=settings["target"],
        gain_p=settings["Kp"],
        gain_i=settings["Ki"],
        p_min=settings["p_min"],
        p_max=settings["p_max"],
    )
    controller = BudgetController(options, [settings["E"]], [settings["p0"]])
    for used, _, integral, threshold in recorded["controller.trace"].tolist():
        assert controller.step([used]) == [pytest.approx(threshold, abs=1e-6)]
        assert controller.integral.item() == pytest.approx(integral, abs=1e-6)


def test_defaults_are_those_of_the_trace(described: dict[str, dict]) -> None:
    settings, defaults = described["controller"], BudgetOptions()
    for name, key in (("target", "target"), ("gain_p", "Kp"), ("gain_i", "Ki"), ("p_min", "p_min"), ("p_max", "p_max")):
        assert getattr(defaults, name) == settings[key]
