import pytest
import torch

from dynmoe_hf.analysis.metrics import pair_usage
from tests.tiny import tiny_model, tokens

FIXED = {"method": "cartesian", "selector": {"k": 3}, "experts": {"second_selector": {"k": 1}}}
ROUTINGS = {"fixed": FIXED, "variable": {"method": "cartesian_top_p", "selector": {"p": 0.5}}}


def routed(name, padded):
    """Both banks of the first layer, and their plain choices of every real token."""
    mask = torch.ones(3, 9, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    output = tiny_model(ROUTINGS[name])(tokens(3, 9), attention_mask=mask, output_routing=True)
    first, second = output.routing[:2]
    choices = [
        [[expert for expert in row if expert < 8] for row in routing.expert_ids[mask.flatten().bool()].tolist()]
        for routing in (first, second)
    ]
    return first, second, choices


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_pair_usage_is_a_plain_loop(name, padded):
    first, second, choices = routed(name, padded)
    expected = [[0.0] * 8 for _ in range(8)]
    for chosen_a, chosen_b in zip(*choices, strict=True):
        for i in chosen_a:
            for j in chosen_b:
                expected[i][j] += 1 / (len(chosen_a) * len(chosen_b)) / len(choices[0])
    usage = pair_usage(first, second)
    assert usage.dtype == torch.float32
    torch.testing.assert_close(usage, torch.tensor(expected))
    assert (len({len(chosen) for chosen in choices[0]}) > 1) == (name == "variable")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_marginals_are_the_shares_of_each_bank(name, padded):
    first, second, choices = routed(name, padded)
    usage = pair_usage(first, second)
    assert usage.sum().item() == pytest.approx(1.0)
    for bank, marginal in enumerate((usage.sum(1), usage.sum(0))):
        for expert in range(8):
            shares = [(expert in chosen) / len(chosen) for chosen in choices[bank]]
            assert marginal[expert].item() == pytest.approx(sum(shares) / len(shares), abs=1e-6)


def test_marginals_of_a_fixed_k_are_the_usage_that_the_balance_loss_reads():
    first, second, _ = routed("fixed", padded=False)
    usage = pair_usage(first, second)
    torch.testing.assert_close(usage.sum(1), first.selected().mean(0) / 3)
    torch.testing.assert_close(usage.sum(0), second.selected().mean(0))


def test_pair_usage_without_a_real_token_is_zero():
    first, second, _ = routed("variable", padded=False)
    nobody = torch.zeros(27, dtype=torch.bool)
    assert not pair_usage(first.masked(nobody), second.masked(nobody)).any()


def test_pair_usage_refuses_banks_of_other_calls():
    model = tiny_model("cartesian")
    first, second = (model(tokens(1, length), output_routing=True).routing[0] for length in (4, 5))
    with pytest.raises(ValueError, match="4 and 5 tokens"):
        pair_usage(first, second)
