import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dynmoe_hf.analysis.statistics import RoutingStatistics, RoutingSummary
from tests.tiny import tiny_config, tiny_model, tokens

METHODS = ("top_k", "top_p", "cartesian")


def batch(lengths, prompt=2, side="right", seed=1):
    """Sequences of these lengths, padded on one side, whose first tokens have no label."""
    size = max(lengths)
    input_ids = tokens(len(lengths), size, seed=seed)
    position = torch.arange(size) if side == "right" else torch.arange(size).flip(0)
    attention_mask = (position < torch.tensor(lengths)[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


BATCHES = [batch((9, 4, 6)), batch((5, 8), side="left", seed=2), batch((7,), prompt=5, seed=3)]


def counted_by_hand(model, batches):
    """One token after the other, from the public outputs of calls without hooks."""
    loads = torch.zeros(len(model.moe_blocks()), model.config.num_experts)
    num_tokens = num_labels = 0
    nll, aux = 0.0, {}
    for inputs in batches:
        output = model(**inputs, output_routing=True)
        routings = [routing for routing in output.routing if routing is not None]
        for token, real in enumerate(inputs["attention_mask"].flatten().tolist()):
            num_tokens += real
            for layer, routing in enumerate(routings):
                for expert in routing.expert_ids[token].tolist():
                    if real and expert < model.config.num_experts:
                        loads[layer, expert] += 1
        targets = inputs["labels"][:, 1:].flatten()
        labels = (targets != -100).sum().item()
        num_labels += labels
        nll += F.cross_entropy(output.logits[:, :-1].flatten(0, 1), targets, reduction="sum").item()
        for name, value in output.aux_losses.items():
            aux[name] = aux.get(name, 0.0) + value.item() * labels
    return (
        loads / num_tokens,
        num_tokens,
        num_labels,
        nll / num_labels,
        {name: v / num_labels for name, v in aux.items()},
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("divided_by_step", [False, True])
@torch.no_grad()
def test_summary_equals_a_count_token_by_token(method, divided_by_step):
    model = tiny_model(method)
    loads, num_tokens, num_labels, lm_loss, aux_losses = counted_by_hand(model, BATCHES)
    with RoutingStatistics(model) as statistics:
        for inputs in BATCHES:
            model(**inputs, **({"num_items_in_batch": torch.tensor(1000)} if divided_by_step else {}))
        summary = statistics.pop("eval")
    assert (summary.num_tokens, summary.num_labels) == (num_tokens, num_labels)
    torch.testing.assert_close(torch.tensor(summary.expert_load), loads)
    torch.testing.assert_close(torch.tensor(summary.experts_per_token_by_layer), loads.sum(-1))
    assert summary.experts_per_token == pytest.approx(loads.sum(-1).mean().item())
    assert summary.dead_experts == (loads == 0).sum()
    assert summary.lm_loss == pytest.approx(lm_loss, rel=1e-6)
    assert summary.aux_losses == pytest.approx(aux_losses, rel=1e-6)
    assert set(aux_losses) == ({"load_balance", "dynamic"} if method == "top_p" else {"load_balance"})


@pytest.mark.parametrize("method", [*METHODS, "da_moe", "mixed"])
@torch.no_grad()
def test_spread_of_experts_and_loads_equals_a_count_token_by_token(method):
    model = tiny_model("top_p" if method == "mixed" else method)
    if method == "mixed":
        model.set_routing("top_k", layers=[2])
    num_experts = model.config.num_experts
    entropies, numbers, loads = [], [], np.zeros((len(model.moe_blocks()), num_experts))
    for inputs in BATCHES:
        routings = [routing for routing in model(**inputs, output_routing=True).routing if routing is not None]
        real = inputs["attention_mask"].flatten().tolist()
        for (router, routing), token in product(enumerate(routings), range(len(real))):
            if real[token]:
                chosen = [expert for expert in routing.expert_ids[token].tolist() if expert < num_experts]
                loads[router, chosen] += 1
                numbers.append((router, len(chosen)))
                entropies.append(
                    -sum(p * math.log(p) for p in routing.probs[token].tolist() if p) / math.log(num_experts)
                )
    with RoutingStatistics(model) as statistics:
        for inputs in BATCHES:
            model(**inputs)
        summary = statistics.pop("eval")
    ordered = sorted(number for _, number in numbers)
    assert summary.experts_per_token_p95 == ordered[math.ceil(0.95 * len(ordered)) - 1]
    assert summary.experts_per_token == pytest.approx(np.mean(ordered))
    for router, shares in enumerate(summary.count_shares):
        own = [number for place, number in numbers if place == router]
        assert shares == pytest.approx([own.count(number) / len(own) for number in range(num_experts + 1)])
    assert summary.load_cv_by_layer == pytest.approx(loads.std(1) / loads.mean(1))
    assert summary.load_cv == pytest.approx((loads.std(1) / loads.mean(1)).mean())
    assert summary.router_entropy == pytest.approx(np.mean(entropies), rel=1e-5)


def test_the_largest_cv_is_that_of_the_worst_choice():
    """Three tokens that use 1, 2 and 3 of four experts: of all ways to choose them, by trial."""
    shares = [0, 1 / 3, 1 / 3, 1 / 3, 0]
    summary = RoutingSummary(3, 0, [[2 / 3, 2 / 3, 1 / 3, 1 / 3]], [shares], [0.5], {}, None)
    choices = [[chosen for chosen in product((0, 1), repeat=4) if sum(chosen) == number] for number in (1, 2, 3)]
    spreads = [np.sum(tokens_, 0).std() / np.sum(tokens_, 0).mean() for tokens_ in product(*choices)]
    assert summary.largest_cv_by_layer == [pytest.approx(max(spreads))]
    assert summary.load_cv_by_layer[0] < max(spreads)


@pytest.mark.parametrize(("twos", "expected"), [(4, 1), (5, 1), (6, 2)])
def test_percentile_at_its_border(twos, expected):
    shares = [0, (100 - twos) / 100, twos / 100]
    assert RoutingSummary(100, 0, [[0.5, 0.5]], [shares], [0.5], {}, None).experts_per_token_p95 == expected


def test_one_expert_has_no_entropy_and_no_spread():
    model = tiny_model({"selector": {"k": 1}}, num_experts=1)
    with RoutingStatistics(model) as statistics:
        model(tokens(2, 5))
        summary = statistics.pop("eval")
    assert (summary.router_entropy, summary.load_cv, summary.experts_per_token_p95) == (0, 0, 1)


def test_scores_that_are_no_distribution_are_made_one():
    model = tiny_model({"selector": {"score_function": "sigmoid"}})
    with torch.no_grad():
        for block in model.moe_blocks():
            block.gate.weight.zero_()  # all alike, and 8 * 0.5 in sum
    with RoutingStatistics(model) as statistics:
        model(tokens(2, 5))
        summary = statistics.pop("eval")
    assert summary.router_entropy == pytest.approx(1.0)


def test_dead_experts_are_counted_in_every_layer():
    model = tiny_model({"method": "top_k", "selector": {"k": 1}})
    with torch.no_grad():
        for block in model.moe_blocks():
            block.gate.weight.zero_()  # ties: every token uses expert 0
    with RoutingStatistics(model) as statistics:
        model(tokens(2, 9))
        summary = statistics.pop("eval")
    assert summary.dead_experts == 2 * 7
    assert summary.expert_load == [[1.0] + [0.0] * 7] * 2


def test_training_and_evaluation_are_counted_apart_and_popping_forgets():
    model = tiny_model("top_p")
    statistics = RoutingStatistics(model)
    model(tokens(2, 9))
    model.train()
    model(tokens(1, 5), labels=tokens(1, 5))
    assert statistics.pop("train").num_tokens == 5
    assert statistics.pop("train") is None
    evaluation = statistics.pop("eval")
    assert (evaluation.num_tokens, evaluation.num_labels, evaluation.lm_loss) == (18, 0, None)
    assert math.isfinite(evaluation.aux_losses["load_balance"])  # without labels: weighted by tokens
    model(tokens(1, 5))
    statistics.reset("train")
    assert statistics.pop("train") is None


def test_detached_statistics_leave_the_model_alone():
    model = tiny_model("top_p")
    with RoutingStatistics(model) as statistics:
        assert model(tokens(1, 5)).routing is not None
    assert model(tokens(1, 7)).routing is None
    assert statistics.pop("eval").num_tokens == 5


def test_recomputed_layers_count_once():
    model = tiny_model("top_p").train()
    inputs = batch((9, 4))
    ran = []
    model.moe_blocks()[0].register_forward_pre_hook(lambda *_: ran.append(1))
    summaries = []
    with RoutingStatistics(model) as statistics:
        for _ in range(2):
            model(**inputs).loss.backward()
            summaries.append(statistics.pop("train"))
            model.gradient_checkpointing_enable()
    assert len(ran) == 3, "the second call was to run its layers twice"
    assert summaries[0] == summaries[1]


def test_call_without_any_label_does_not_spoil_the_means():
    model = tiny_model("top_p")
    inputs = batch((9, 4))
    with RoutingStatistics(model) as statistics:
        model(**inputs)
        expected = statistics.pop("eval")
        model(**inputs)
        unlabelled = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
        assert model(**unlabelled).lm_loss.isnan()
        summary = statistics.pop("eval")
    assert (summary.num_tokens, summary.num_labels) == (2 * expected.num_tokens, expected.num_labels)
    assert (summary.lm_loss, summary.aux_losses) == (expected.lm_loss, expected.aux_losses)


def test_shifted_labels_count_as_they_are():
    model = tiny_model("top_k")
    ids = tokens(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=5)
    with RoutingStatistics(model) as statistics:
        loss = model(ids, labels=ids, shift_labels=shifted).lm_loss
        summary = statistics.pop("eval")
    assert (summary.num_labels, summary.lm_loss) == (18, pytest.approx(loss.item()))


def test_inference_mode_and_no_grad_add_up():
    model = tiny_model("top_p")
    with RoutingStatistics(model) as statistics:
        with torch.inference_mode():
            model(tokens(1, 5))
        with torch.no_grad():
            model(tokens(1, 5))
        with torch.inference_mode():
            model(tokens(1, 5))
        assert statistics.pop("eval").num_tokens == 15


@pytest.mark.parametrize(
    ("auto_class", "inputs", "num_labels"),
    [
        (AutoModel, {}, 0),
        (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1])}, 2),
        (AutoModelForTokenClassification, {"labels": torch.tensor([[0, 1, -100, 1], [1, 1, 1, -100]])}, 6),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])},
            2,
        ),
    ],
)
def test_every_head(auto_class, inputs, num_labels):
    torch.manual_seed(0)
    model = auto_class.from_config(tiny_config("top_p", num_labels=2)).eval()
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with RoutingStatistics(model) as statistics:
        output = model(tokens(2, 4), attention_mask=attention_mask, **inputs)
        summary = statistics.pop("eval")
    assert (summary.num_tokens, summary.num_labels) == (7, num_labels)
    assert summary.lm_loss == (pytest.approx(output.lm_loss.item()) if num_labels else None)


class CountWaits(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_counting_does_not_wait_for_the_device():
    model = tiny_model("top_p", engine="reference").train()
    inputs = batch((9, 4)) | {"num_items_in_batch": torch.tensor(99)}
    with CountWaits() as without:
        model(**inputs, output_routing=True)
    statistics = RoutingStatistics(model)
    with CountWaits() as counting:
        model(**inputs)
    with CountWaits() as popping:
        statistics.pop("train")
    assert counting.waits == without.waits
    assert popping.waits > 0, "a wait was to be seen"
