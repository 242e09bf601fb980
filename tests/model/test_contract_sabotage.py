"""Each rule of the contract notices a part that breaks it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from dynmoe_hf.model import attention, blocks, dispatch, modeling_dynmoe
from dynmoe_hf.model.expert_selectors import SELECTORS, TopK, TopKOptions, TopP, TopPOptions
from dynmoe_hf.model.routing import Routing, RoutingContext
from dynmoe_hf.model.scorers import SCORERS, LinearScorer, RecurrentScorer, Scores
from tests.model import contract


@strict
@dataclass
class NoOptions:
    """No options."""


class WeightInUnusedSlot(TopP):
    """Leaves the probability of a dropped expert in its slot."""

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        routing = super().forward(logits, context)
        return routing._replace(weights=routing.weights + 0.01)


class HigherIndexFirst(TopK):
    """Breaks ties towards the higher index."""

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        routing = super().forward(logits.flip(-1), context)
        ids = logits.shape[-1] - 1 - routing.expert_ids
        return Routing(ids, routing.weights, logits, routing.probs.flip(-1))


class SameExpertTwice(TopK):
    """Fills every slot with the best expert."""

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        routing = super().forward(logits, context)
        return routing._replace(expert_ids=routing.expert_ids[:, :1].expand_as(routing.expert_ids))


class ModelDtypeScorer(LinearScorer):
    """Computes its scores in the dtype of the model."""

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        return Scores(torch.nn.functional.linear(hidden_states, self.weight).float())


class CoarseSelector(TopK):
    """Rounds the scores before it chooses."""

    def forward(self, logits: Tensor, context: RoutingContext) -> Routing:
        routing = super().forward(logits.bfloat16(), context)
        return routing._replace(probs=routing.probs.float())


class LooksAtOtherTokens(LinearScorer):
    """Centres its scores over the tokens of the call, later ones and those of other sequences included."""

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        logits = super().forward(hidden_states, context).logits
        return Scores(logits - logits.mean(0, keepdim=True) if logits.shape[0] else logits)


class CountsCalls(LinearScorer):
    """Counts its calls in a buffer."""

    def __init__(self, options: Any, config: Any) -> None:
        super().__init__(options, config)
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        self.calls += 1
        return super().forward(hidden_states, context)

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        nn.init.zeros_(self.calls)


class NoisyInTraining(LinearScorer):
    """Adds noise while it trains."""

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        logits = super().forward(hidden_states, context).logits
        return Scores(logits + torch.randn_like(logits) if self.training else logits)


class DetachedScorer(LinearScorer):
    """Loses the gradient of the router when a layer is recomputed."""

    def forward(self, hidden_states: Tensor, context: RoutingContext) -> Scores:
        logits = super().forward(hidden_states, context).logits
        return Scores(logits if torch.is_grad_enabled() and not _inside_checkpoint() else logits.detach())


def _inside_checkpoint() -> bool:
    import inspect

    return any("checkpoint" in frame.filename for frame in inspect.stack())


def selector(part: type) -> dict[str, Any]:
    return {"selector": {"type": part.__name__}}


def scorer(part: type) -> dict[str, Any]:
    return {"scorer": {"type": part.__name__}}


SABOTEURS: list[tuple[type, dict[str, Any], Callable]] = [
    (WeightInUnusedSlot, selector(WeightInUnusedSlot), contract.rule_1_slots_and_ties),
    (HigherIndexFirst, selector(HigherIndexFirst), contract.rule_1_slots_and_ties),
    (SameExpertTwice, selector(SameExpertTwice), contract.rule_1_slots_and_ties),
    (ModelDtypeScorer, scorer(ModelDtypeScorer), contract.rule_2_float32),
    (CoarseSelector, selector(CoarseSelector), contract.rule_2_float32),
    (LooksAtOtherTokens, scorer(LooksAtOtherTokens), contract.rule_3_padding),
    (LooksAtOtherTokens, scorer(LooksAtOtherTokens), contract.rule_4_causal),
    (LooksAtOtherTokens, scorer(LooksAtOtherTokens), contract.rule_5_batches_and_nothing),
    (CountsCalls, scorer(CountsCalls), contract.rule_6_no_side_effects),
    (NoisyInTraining, scorer(NoisyInTraining), contract.rule_7_checkpointing_and_modes),
    (DetachedScorer, scorer(DetachedScorer), contract.rule_7_checkpointing_and_modes),
]


@pytest.mark.parametrize(("part", "routing", "rule"), SABOTEURS, ids=lambda value: getattr(value, "__name__", None))
def test_rule_notices_a_bad_part(part: type, routing: dict[str, Any], rule: Callable, monkeypatch) -> None:
    part.Options = {TopK: TopKOptions, TopP: TopPOptions}.get(part.__mro__[1], NoOptions)
    table = SELECTORS if "selector" in routing else SCORERS
    monkeypatch.setitem(table, part.__name__, part)
    with pytest.raises(AssertionError):
        rule(routing)


def test_rule_3_notices_padding_that_selects(monkeypatch) -> None:
    monkeypatch.setattr(Routing, "masked", lambda self, token_mask: self)
    with pytest.raises(AssertionError):
        contract.rule_3_padding("top_p")


def test_rule_3_notices_padding_in_a_loss(monkeypatch) -> None:
    build = modeling_dynmoe.TokenWeights.build
    monkeypatch.setattr(
        modeling_dynmoe.TokenWeights, "build", lambda mask, counts, shape, device: build(None, counts, shape, device)
    )
    with pytest.raises(AssertionError):
        contract.rule_3_padding("top_k")


def test_rule_5_notices_a_missing_gradient(monkeypatch) -> None:
    def forgetful(experts: nn.Module, hidden: Tensor, routing: Routing, *_: Any) -> Tensor:
        if not routing.used.any():
            return torch.zeros_like(hidden)
        return dispatch.run_flat(experts, hidden, routing)

    monkeypatch.setattr(blocks, "run_experts", forgetful)
    with pytest.raises((AssertionError, RuntimeError)):
        contract.rule_5_batches_and_nothing("top_p")


def test_rule_4_notices_attention_that_is_yet_to_come(monkeypatch) -> None:
    def attention_received(query: Tensor, key: Tensor, scaling: float, *_: Any) -> Tensor:
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return (query @ keys.transpose(2, 3) * scaling).softmax(-1).mean((1, 2))[:, -query.shape[2] :]

    monkeypatch.setattr(attention, "row_statistics", attention_received)
    with pytest.raises(AssertionError):
        contract.rule_4_causal({"method": "da_moe", "selector": {"scale": 2.0}})


def test_rule_4_notices_a_state_that_runs_over_the_sequence(monkeypatch) -> None:
    forward = RecurrentScorer.forward

    def shifted(self: RecurrentScorer, hidden_states: Tensor, context: RoutingContext) -> Scores:
        state = context.state if context.state is None else context.state.roll(1, 0)
        return forward(self, hidden_states, context._replace(state=state))

    monkeypatch.setattr(RecurrentScorer, "forward", shifted)
    with pytest.raises(AssertionError):
        contract.rule_4_causal({"method": "rmoe", "scorer": {"init": "uniform"}})


def test_rule_6_notices_a_step_that_is_reported_twice(monkeypatch) -> None:
    report = modeling_dynmoe.count_for_controller

    def twice(*args: Any) -> None:
        report(*args)
        report(*args)

    monkeypatch.setattr(modeling_dynmoe, "count_for_controller", twice)
    with pytest.raises(AssertionError):
        contract.rule_6_no_side_effects("dtop_p")


def test_rule_7_notices_a_state_without_gradient_under_checkpointing(monkeypatch) -> None:
    layer = modeling_dynmoe.DynMoeDecoderLayer.forward

    def losing_the_state(self: nn.Module, hidden: Tensor, state: Tensor | None = None, **kwargs: Any) -> Any:
        state = state.detach() if state is not None and self.gradient_checkpointing else state
        return layer(self, hidden, state, **kwargs)

    monkeypatch.setattr(modeling_dynmoe.DynMoeDecoderLayer, "forward", losing_the_state)
    with pytest.raises(AssertionError):
        contract.rule_7_checkpointing_and_modes({"method": "rmoe", "scorer": {"init": "uniform"}})
