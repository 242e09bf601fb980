"""Auxiliary losses against plain loops, and what they must not depend on."""

import math

import pytest
import torch
from torch import Tensor

from dynmoe_hf.model import losses
from dynmoe_hf.model.losses import TokenWeights, auxiliary_losses, load_balance
from dynmoe_hf.model.routing import Routing
from tests.tiny import tiny_model, tokens

BATCH, LENGTH, EXPERTS = 3, 6, 4


def random_routing(seed: int, mask: Tensor | None = None) -> Routing:
    """Top-p-like: one to three experts a token."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH * LENGTH, EXPERTS, generator=generator)
    probs = logits.softmax(-1)
    ids = probs.argsort(descending=True)[:, :3]
    count = torch.randint(1, 4, (BATCH * LENGTH, 1), generator=generator)
    ids = ids.masked_fill(torch.arange(3) >= count, EXPERTS)
    weights = (ids < EXPERTS).float()
    return Routing(ids, weights, logits, probs).masked(None if mask is None else mask.reshape(-1))


def loop_balance(routing: Routing, tokens_of_group: list[int]) -> float:
    """E * sum_e f_e Q_e over a list of token indices."""
    total = 0.0
    for expert in range(EXPERTS):
        used = sum(expert in routing.expert_ids[token].tolist() for token in tokens_of_group)
        probability = sum(routing.probs[token, expert].item() for token in tokens_of_group)
        total += used / len(tokens_of_group) * probability / len(tokens_of_group)
    return EXPERTS * total


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
REAL = [[row * LENGTH + column for column in range(LENGTH) if MASK[row, column]] for row in range(BATCH)]
LABELS = torch.tensor([5, 3, 1])


def weights(label_counts: Tensor | None = LABELS) -> TokenWeights:
    return TokenWeights.build(MASK, label_counts, (BATCH, LENGTH), torch.device("cpu"))


def test_load_balance_over_sequences_is_a_plain_loop() -> None:
    routing = random_routing(0, MASK)
    expected = sum(count / 9 * loop_balance(routing, real) for count, real in zip([5, 3, 1], REAL, strict=True))
    assert load_balance([routing], weights(), "sequence").item() == pytest.approx(expected, rel=1e-5)


def test_load_balance_over_the_call_is_the_papers_form() -> None:
    routing = random_routing(0, MASK)
    expected = loop_balance(routing, sum(REAL, []))
    for counts in (None, LABELS):
        assert load_balance([routing], weights(counts), "micro").item() == pytest.approx(expected, rel=1e-5)
    mean_experts = sum(routing.num_selected[token].item() for token in sum(REAL, [])) / len(sum(REAL, []))
    normalized = load_balance([routing], weights(), "micro", normalize=True).item()
    assert normalized == pytest.approx(expected / mean_experts, rel=1e-5)


def test_entropy_and_z_are_plain_loops() -> None:
    routing = random_routing(1, MASK)
    entropy, z = 0.0, 0.0
    for count, real in zip([5, 3, 1], REAL, strict=True):
        for token in real:
            share = count / 9 / len(real)
            entropy -= share * sum(p * math.log(p) for p in routing.probs[token].tolist())
            z += share * math.log(sum(math.exp(value) for value in routing.logits[token].tolist())) ** 2
    assert losses.entropy(routing, weights()).item() == pytest.approx(entropy, rel=1e-5)
    assert losses.router_z(routing, weights()).item() == pytest.approx(z, rel=1e-5)


def test_entropy_has_a_finite_gradient_where_a_probability_underflows() -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0, 0.0]] * (BATCH * LENGTH), requires_grad=True)
    routing = random_routing(0)._replace(logits=logits, probs=logits.softmax(-1))
    everything = TokenWeights.build(None, None, (BATCH, LENGTH), torch.device("cpu"))
    value = losses.entropy(routing, everything)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert logits.grad.isfinite().all()


def collapsed(expert: int) -> Routing:
    """Every token uses the same expert with certainty."""
    logits = torch.full((BATCH * LENGTH, EXPERTS), -50.0)
    logits[:, expert] = 50.0
    ids = torch.full((BATCH * LENGTH, 1), expert)
    return Routing(ids, torch.ones(BATCH * LENGTH, 1), logits, logits.softmax(-1))


def test_pooling_hides_a_collapse_and_the_mean_over_layers_does_not() -> None:
    routings = [collapsed(layer) for layer in range(4)]
    coefficients = [{"load_balance": 1.0}] * 4
    results = {}
    for reduction in ("mean", "sum", "pooled"):
        values, total = auxiliary_losses(routings, coefficients, weights(), "micro", reduction=reduction)
        assert total.item() == pytest.approx(values["load_balance"].item(), rel=1e-6)
        results[reduction] = values["load_balance"].item()
    assert results == pytest.approx({"mean": 4.0, "sum": 16.0, "pooled": 1.0}, rel=1e-5)


def test_coefficients_may_differ_between_layers() -> None:
    routings = [random_routing(seed, MASK) for seed in range(3)]
    coefficients = [{"load_balance": 0.5}, {"load_balance": 0.0, "router_z": 0.2}, {"load_balance": 0.1}]
    values, total = auxiliary_losses(routings, coefficients, weights())
    balance = load_balance(routings, weights())
    z = losses.router_z(routings[1], weights())
    assert set(values) == {"load_balance", "router_z"}
    torch.testing.assert_close(values["load_balance"], balance[[0, 2]].mean())
    torch.testing.assert_close(total, (0.5 * balance[0] + 0.1 * balance[2] + 0.2 * z) / 3)


def test_usage_has_no_gradient_and_probability_has() -> None:
    logits = torch.randn(BATCH * LENGTH, EXPERTS, requires_grad=True)
    routing = random_routing(0, MASK)._replace(logits=logits, probs=logits.softmax(-1))
    usage, probability = (
        losses.group_means(part, weights(), "sequence") for part in (routing.selected(), routing.probs)
    )
    assert not usage.requires_grad
    assert probability.requires_grad


def test_weights_of_a_call_without_any_label_are_zero_and_finite() -> None:
    none = weights(torch.zeros(3, dtype=torch.long))
    values, total = auxiliary_losses([random_routing(0, MASK)], [{"load_balance": 1.0, "dynamic": 1.0}], none)
    assert total.item() == 0.0 and all(value.isfinite() for value in values.values())


@pytest.mark.parametrize("routing", ["top_k", "top_p"])
@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_pieces_of_a_batch_add_up(routing: str, pieces: int) -> None:
    """Loss and gradients of the whole batch are the sums over any pieces of it, with unequal labels and padding."""
    content = tokens(8, 10)
    mask = torch.ones_like(content)
    labels = content.clone()
    for row in range(8):
        mask[row, 10 - row :] = 0
        labels[row, : (row * 3) % 5] = -100
    labels[mask == 0] = -100
    count = (labels[:, 1:] != -100).sum()
    results = []
    for number in (1, pieces):
        losses_on = {"load_balance": 1.0, "dynamic": 1.0, "router_z": 1.0}
        model = tiny_model({"method": routing, "losses": losses_on}).train()
        total = 0.0
        for part in zip(*(tensor.chunk(number) for tensor in (content, mask, labels)), strict=True):
            output = model(part[0], attention_mask=part[1], labels=part[2], num_items_in_batch=count)
            output.loss.backward()
            total += output.loss.item()
        results.append((total, [block.gate.weight.grad for block in model.moe_blocks()]))
    (whole, gradients), (summed, pieced) = results
    assert summed == pytest.approx(whole, rel=1e-6)
    for gradient, piece in zip(gradients, pieced, strict=True):
        torch.testing.assert_close(piece, gradient, rtol=1e-5, atol=1e-6)


def test_the_papers_scope_depends_on_the_cut() -> None:
    """Why `sequence` is the default: the product of means over a whole call is not additive."""
    content = tokens(4, 10)
    count = torch.tensor(36)
    totals = []
    for number in (1, 4):
        model = tiny_model({"losses": {"load_balance": 1.0}}, balance_scope="micro").train()
        parts = [model(part, labels=part, num_items_in_batch=count).loss.item() for part in content.chunk(number)]
        totals.append(sum(parts))
    assert abs(totals[0] - totals[1]) > 1e-3


def test_losses_are_on_with_labels_and_returned_by_name() -> None:
    content = tokens(2, 8)
    model = tiny_model("top_p")
    output = model(content, labels=content)
    assert set(output.aux_losses) == {"load_balance", "dynamic"}
    weighted = 0.01 * output.aux_losses["load_balance"] + 1e-4 * output.aux_losses["dynamic"]
    torch.testing.assert_close(output.loss, output.lm_loss + weighted)
    assert model(content).aux_losses is None and model(content).loss is None
    off = tiny_model({"method": "top_p", "losses": {"load_balance": 0.0, "dynamic": 0.0}})
    output = off(content, labels=content)
    assert output.aux_losses is None and torch.equal(output.loss, output.lm_loss)


def test_router_logits_bring_the_load_balance_along() -> None:
    content = tokens(2, 8)
    model = tiny_model("top_k")
    output = model(content, output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(16, 8), (16, 8)]
    assert torch.equal(output.aux_loss, output.aux_losses["load_balance"])
    plain = model(content)
    assert plain.router_logits is None and plain.aux_loss is None


def test_a_frozen_rest_still_lets_the_router_learn_from_the_losses() -> None:
    model = tiny_model({"losses": {"load_balance": 1.0}}).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("gate.weight" in name)
    content = tokens(2, 8)
    model(content, labels=content).loss.backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in model.moe_blocks())
