"""Alarms ring for planted failures, in the right layer, and stay silent for what is healthy."""

import re
import warnings

import pytest
import torch

from dynmoe_hf.analysis.statistics import RoutingStatistics
from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training.alarms import PATIENCE, RoutingAlarms
from dynmoe_hf.training.callbacks import RoutingCallback
from tests.tiny import tiny_model, tokens
from tests.training.test_callbacks import make_trainer

WORDS = re.compile("collapsed|runs away")
SILENT = {"alarm/collapse": 0, "alarm/runaway": 0}


def collapse(block):
    """From now on every token ranks the experts of a block alike; `remove` of what is returned ends it."""
    ranking = torch.linspace(2, -2, block.config.num_experts)
    return block.selector.register_forward_pre_hook(lambda _, args: (ranking.expand_as(args[0]), *args[1:]))


def alarms_in(caught) -> list[str]:
    return [str(warning.message) for warning in caught if WORDS.search(str(warning.message))]


def checks(model, number, batch=None, change=None):
    """What the alarms say after each of several logs, and their warnings."""
    alarms = RoutingAlarms(model)
    batch = tokens(8, 32) if batch is None else batch
    found = []
    with RoutingStatistics(model) as statistics, torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for log in range(number):
            if change is not None:
                change(log)
            model(batch)
            found.append(alarms.check(statistics.pop("eval")))
    return found, alarms_in(caught)


@pytest.mark.parametrize("method", METHODS)
def test_a_healthy_run_is_silent(tmp_path, method):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, [RoutingCallback], method, max_steps=12, logging_steps=3, learning_rate=1e-3)
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4 and all(log.items() >= SILENT.items() for log in logs)
    assert not alarms_in(caught)


@pytest.mark.parametrize(
    "routing", ["top_k", {"selector": {"k": 1}}, "top_p", {"method": "top_p", "selector": {"p": 0.8}}]
)
def test_a_collapsed_router_is_named_once(routing):
    model = tiny_model(routing)
    collapse(model.moe_blocks()[1])
    found, told = checks(model, PATIENCE + 2)
    assert [log["alarm/collapse"] for log in found] == [0] * (PATIENCE - 1) + [1] * 3
    assert all(log["alarm/runaway"] == 0 for log in found)
    (message,) = told
    assert "layer 2 " in message and "load_balance (now 0.01)" in message
    used = model(tokens(8, 32), output_routing=True).routing[2].selected().mean(0)
    assert f"{(used == 0).sum()} of 8 experts got no token, and the most used one got 100%" in message


def test_a_collapse_of_training_is_logged_and_told(tmp_path):
    """The balance loss is off and the routers biased, to one direction that all tokens share: nothing pulls it back."""

    def biased(model):
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 8.0
            for block in model.moe_blocks():
                block.gate.weight[:, 0] = torch.linspace(10, -10, 8)
        return RoutingCallback(model)

    routing = {"method": "top_k", "losses": {"load_balance": 0}}
    settings = {"max_steps": 20, "logging_steps": 4, "learning_rate": 1e-3}
    with pytest.warns(UserWarning, match="In layer 0 the router has collapsed.*load_balance .now 0."):
        trainer = make_trainer(tmp_path, [biased], routing, **settings)
        trainer.train()
    logged = [log["alarm/collapse"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [0, 0, 2, 2, 2]


def test_half_idle_experts_are_no_collapse_and_three_quarters_are():
    for reachable, expected in ((4, 0), (2, 1)):
        model = tiny_model({"selector": {"k": 1}})
        with torch.no_grad():  # an expert out of reach has the score of another one, and loses the tie
            weight = model.moe_blocks()[0].gate.weight
            weight[reachable:] = weight[0]
        found, _ = checks(model, PATIENCE)
        assert found[-1] == SILENT | {"alarm/collapse": expected}


def test_few_tokens_say_nothing():
    model = tiny_model({"selector": {"k": 1}})
    collapse(model.moe_blocks()[0])
    assert checks(model, PATIENCE + 1, tokens(1, 127)) == ([SILENT] * (PATIENCE + 1), [])
    assert checks(model, PATIENCE, tokens(1, 128))[0][-1]["alarm/collapse"] == 1


def test_a_recovered_router_starts_again():
    model = tiny_model({"selector": {"k": 1}})
    planted = []

    def change(log):
        if log == PATIENCE - 1:
            planted.pop().remove()
        elif not planted:
            planted.append(collapse(model.moe_blocks()[0]))

    found, told = checks(model, 2 * PATIENCE, change=change)
    assert [log["alarm/collapse"] for log in found] == [0] * (2 * PATIENCE - 1) + [1]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("routing", "advice"),
    [
        ({"method": "top_p", "selector": {"p": 0.99}}, "routing.selector.p (now 0.99)"),
        ({"method": "da_moe", "selector": {"scale": 50}}, "routing.selector.scale (now 50)"),
    ],
)
def test_nearly_all_experts_are_runaway_compute(tmp_path, routing, advice):

    def undecided(model):
        with torch.no_grad():
            for block in model.moe_blocks():
                block.gate.weight.mul_(0.1)
        return RoutingCallback(model)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, [undecided], routing, max_steps=5, learning_rate=1e-3)
        trainer.train()
    logged = [log["alarm/runaway"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [0, 0, 2, 2, 2]
    told = alarms_in(caught)
    assert len(told) == 2
    assert all(advice in message and "8 experts, so routing saves nothing" in message for message in told)


def test_a_doubled_number_of_experts_is_runaway_compute():
    """All experts are asked for by no layer; one layer doubles its number."""
    model = tiny_model({"method": "top_p", "selector": {"p": 0.1, "max_experts": 6}})
    before = [model(tokens(8, 32), output_routing=True).experts_per_token.tolist()]

    def change(log):
        if log == 1:
            model.set_routing(selector={"p": 0.9}, layers=[2])

    found, told = checks(model, PATIENCE + 1, change=change)
    after = model(tokens(8, 32), output_routing=True).experts_per_token.tolist()
    assert 2 * before[0][1] <= after[1] < 0.9 * 8
    assert [log["alarm/runaway"] for log in found] == [0] * PATIENCE + [1]
    (message,) = told
    assert message.startswith("In layer 2 ") and f"at the first log {before[0][1]:.1f}" in message


def test_all_experts_on_purpose_are_no_alarm():
    assert checks(tiny_model({"selector": {"k": 8}}), PATIENCE + 1) == ([SILENT] * (PATIENCE + 1), [])


@pytest.mark.parametrize("experts", ["swiglu", "cartesian"])
@pytest.mark.parametrize("too_high", [False, True])
def test_a_controlled_layer_is_held_to_the_mean_of_all(experts, too_high):
    """A global budget lets one layer use more if the others use less; the experts of a cartesian layer are pairs."""
    model = tiny_model({"method": "dtop_p", "experts": experts, "controller": {"target": 4}})
    thresholds = [0.8 if too_high else 0.0, 1.0]
    with torch.no_grad():
        for block in model.moe_blocks():
            block.selector.threshold.fill_(thresholds[block.layer_idx // 2])
            block.selector.num_slots = 8 if experts == "swiglu" else 3
    routings = [routing for routing in model(tokens(8, 32), output_routing=True).routing if routing is not None]
    used = [routing.num_selected.float() for routing in routings]
    if experts == "cartesian":
        used = [used[0] * used[1], used[2] * used[3]]
    low, high = (each.mean().item() for each in used)
    assert high >= 8 and (low + high > 2 * 1.5 * 4) == too_high
    found, told = checks(model, PATIENCE)
    assert found[-1] == {"alarm/collapse": 0, "alarm/runaway": len(routings) if too_high else 0}
    expected = f"{(low + high) / 2:.1f} in the mean, where its target is 4"
    assert len(told) == found[-1]["alarm/runaway"] and all(expected in message for message in told)
