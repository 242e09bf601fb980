"""Every rule of the contract, over every registered part and preset."""

import pytest

from tests.model.contract import RULES
from tests.tiny import all_routings, tiny_config

ROUTINGS = all_routings()


def accepted(routing: dict) -> bool:
    """Whether the config takes this combination; a refusal must give a reason."""
    try:
        tiny_config(routing)
    except ValueError as error:
        assert len(str(error)) > 20, "a combination is refused without a reason"
        return False
    return True


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", ROUTINGS)
def test_rule(name: str, rule) -> None:
    if not accepted(ROUTINGS[name]):
        pytest.skip("refused by the config, with a reason")
    rule(ROUTINGS[name])
