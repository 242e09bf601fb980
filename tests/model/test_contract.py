"""Every rule of the contract, over every registered part and preset."""

import pytest

from dynmoe_hf.model.expert_selectors import SELECTORS
from dynmoe_hf.model.scorers import SCORERS
from tests.model.contract import RULES
from tests.tiny import all_routings, combinations, refusal

ROUTINGS = all_routings()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", ROUTINGS)
def test_rule(name: str, rule) -> None:
    rule(ROUTINGS[name])


def test_combinations_are_refused_for_these_reasons_only() -> None:
    refused = 0
    for parts in combinations().values():
        has_activations = parts["experts"]["type"] == "low_rank"
        scorer, selector = SCORERS[parts["scorer"]["type"]], SELECTORS[parts["selector"]["type"]]
        reasons = []
        if scorer.reads_norms and not has_activations:
            reasons.append("low-rank activation")
        if parts["controller"]["type"] != "none" and not selector.has_threshold:
            reasons.append("moves a threshold")
        message = refusal(parts)
        assert (message is None) == (not reasons), f"{parts}: {message}"
        assert not reasons or any(reason in message for reason in reasons)
        refused += message is not None
    assert 0 < refused < len(combinations())
