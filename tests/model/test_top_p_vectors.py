"""Our top-p models against tensors recorded from the official Dynamic_MoE code (`tests/vectors/README.md`)."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.convert import FORMATS, from_ours, to_ours
from dynmoe_hf.model import attention
from dynmoe_hf.model.expert_selectors import TopP, TopPOptions
from dynmoe_hf.model.losses import TokenWeights, entropy, load_balance
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.recorded import CLOSE, LOWEST, Vectors, compare_prefill_and_one_cached_step, vectors
from tests.tiny import ENGINES

MODELS = ("topp_all_moe_p040", "topp_interleaved_p070")
ENGINE_CASES = [(MODELS[0], engine) for engine in ENGINES] + [(MODELS[1], "ragged")]


def official_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention as the official code clamps it: the gradient of a padding row follows `max`, not its first argument."""
    scores = torch.max(query @ key.transpose(2, 3) * scaling + mask, torch.tensor(LOWEST))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def our_state_dict(official: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: value for name, value in official.items() if not name.endswith("rotary_emb.inv_freq")}
    return to_ours(FORMATS["dynamic_moe"].rules, kept)


def our_model(recorded: Vectors, engine: str = "eager") -> DynMoeForCausalLM:
    arguments, _ = FORMATS["dynamic_moe"].read_config(recorded.official)
    config = DynMoeConfig(**arguments)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=engine)
    model.load_state_dict(our_state_dict(recorded.under("weights.")))
    return model.eval()


def assert_same_choice(routing: Routing, sorted_indices: Tensor, rows: Tensor | slice = slice(None)) -> None:
    """The experts of the tokens in `rows` equal the official ones, in order; -1 is an official unused slot."""
    expected = sorted_indices.masked_fill(sorted_indices < 0, routing.num_experts)
    assert torch.equal(routing.expert_ids[rows], expected[rows])


def top_p(num_experts: int, **options: Any) -> TopP:
    config = DynMoeConfig(num_experts=num_experts, routing={"method": "top_p", "selector": options})
    return TopP(TopPOptions(**options), config)


@pytest.mark.parametrize("name", MODELS)
def test_router_and_choice_in_every_layer(name: str) -> None:
    recorded = vectors(name)
    output = our_model(recorded)(**recorded.inputs, attention_mask=recorded["in.attention_mask"], output_routing=True)
    real = recorded.real.flatten()
    assert any(routing is not None for routing in output.routing)
    for layer, routing in enumerate(output.routing):
        if f"act.layers.{layer}.router_logits" not in recorded:
            assert routing is None
            continue
        assert_same_choice(routing, recorded.layer(layer, "sorted_indices"), real)
        assert torch.equal(routing.num_selected[real], recorded.layer(layer, "num_selected")[real])
        for field, official in {
            "logits": "router_logits",
            "probs": "router_probs",
            "weights": "sorted_weights",
        }.items():
            ours = getattr(routing, field)
            torch.testing.assert_close(ours[real], recorded.layer(layer, official)[real], **CLOSE)


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_logits_and_hidden_states(name: str, engine: str) -> None:
    recorded = vectors(name)
    model = our_model(recorded, engine)
    output = model(**recorded.inputs, attention_mask=recorded["in.attention_mask"], output_hidden_states=True)
    real = recorded.real
    torch.testing.assert_close(output.logits[real], recorded["out.logits"][real], **CLOSE)
    assert len(output.hidden_states) == recorded.official["num_hidden_layers"] + 1
    for number, hidden_states in enumerate(output.hidden_states):
        expected = recorded[f"out.hidden_states.{number}"]
        torch.testing.assert_close(hidden_states[real], expected[real], **CLOSE)


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_every_ffn_alone(name: str, engine: str) -> None:
    recorded = vectors(name)
    for layer, decoder_layer in enumerate(our_model(recorded, engine).model.layers):
        hidden_states = recorded[f"act.layers.{layer}.ffn_input"]
        if decoder_layer.is_sparse:
            output, routing = decoder_layer.mlp(hidden_states, RoutingContext(layer))
            assert_same_choice(routing, recorded.layer(layer, "sorted_indices"))
            dense = torch.zeros_like(routing.probs)
            token, slot = routing.used.nonzero(as_tuple=True)
            dense[token, routing.expert_ids[token, slot]] = routing.weights[token, slot]
            torch.testing.assert_close(dense, recorded.layer(layer, "dense_weights"), **CLOSE)
        else:
            output = decoder_layer.mlp(hidden_states)
        torch.testing.assert_close(output, recorded[f"act.layers.{layer}.ffn_output"], **CLOSE)


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_language_model_loss_and_its_gradients(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One label is predicted from padding, so here padding must be computed as in the official code."""
    recorded = vectors(name)
    model = our_model(recorded, engine)
    monkeypatch.setattr(attention, "eager_attention_forward", official_attention)
    model.set_attn_implementation("eager")
    output = model(**recorded.inputs, attention_mask=recorded.official_mask, labels=recorded["in.labels"])
    torch.testing.assert_close(output.logits, recorded["out.logits"], **CLOSE)
    torch.testing.assert_close(output.lm_loss[None], recorded["out.ce_loss"], **CLOSE)
    output.lm_loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = from_ours(FORMATS["dynamic_moe"].rules, gradients)
    expected = recorded.under("grad.")
    assert any("router" in name for name in expected)
    for official, value in expected.items():
        torch.testing.assert_close(
            gradients[official], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=official
        )


@pytest.mark.parametrize(("name", "engine"), ENGINE_CASES)
def test_prefill_and_one_cached_step(name: str, engine: str) -> None:
    recorded = vectors(name)
    compare_prefill_and_one_cached_step(our_model(recorded, engine), recorded)


@pytest.mark.parametrize("name", MODELS)
def test_losses_over_real_tokens(name: str) -> None:
    recorded = vectors(name)
    output = our_model(recorded)(**recorded.inputs, attention_mask=recorded["in.attention_mask"], output_routing=True)
    weights = TokenWeights.build(recorded.real, None, tuple(recorded.real.shape), torch.device("cpu"))
    derived = defaultdict(list)
    for layer, routing in enumerate(output.routing):
        if routing is None:
            continue
        expected = {part: recorded[f"derived.layers.{layer}.{part}_loss"] for part in ("balance", "entropy")}
        torch.testing.assert_close(load_balance([routing], weights, scope="micro"), expected["balance"], **CLOSE)
        torch.testing.assert_close(entropy(routing, weights)[None], expected["entropy"], **CLOSE)
        derived["load_balance"].append(expected["balance"])
        derived["dynamic"].append(expected["entropy"])
        derived["mean_selected"].append(recorded[f"derived.layers.{layer}.mean_selected"])
    for loss in ("load_balance", "dynamic"):
        torch.testing.assert_close(output.aux_losses[loss], torch.cat(derived[loss]).mean(), **CLOSE)
    torch.testing.assert_close(output.experts_per_token, torch.cat(derived["mean_selected"]), **CLOSE)


@pytest.mark.parametrize("percent", [0, 10, 30, 40, 50, 70, 90, 99, 100])
def test_selector_grid(percent: int) -> None:
    recorded = vectors("topp_selector_grid")
    expected = recorded.under(f"p{percent:03d}.")
    routing = top_p(8, p=percent / 100)(recorded["in.router_logits"], RoutingContext(0))
    torch.testing.assert_close(routing.probs, recorded["in.router_probs"], rtol=0, atol=1e-7)
    assert_same_choice(routing, expected["sorted_indices"])
    assert torch.equal(routing.num_selected, expected["num_selected"])
    torch.testing.assert_close(routing.weights, expected["sorted_weights"], rtol=0, atol=1e-7)


class KnownProbabilities(Tensor):
    """Logits whose softmax is exactly these probabilities: the rounding of `exp(log P)` would break a tie."""

    def softmax(self, dim: int) -> Tensor:
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("percent", [25, 50, 75, 100])
def test_exact_ties_of_the_released_selector(percent: int) -> None:
    recorded = vectors("topp_selector_grid")
    probs = recorded["tie.router_probs"]
    expected = recorded.under(f"tie_p{percent:03d}.")
    routing = top_p(4, p=percent / 100)(probs.as_subclass(KnownProbabilities), RoutingContext(0))
    assert torch.equal(routing.num_selected, expected["num_selected"])
    assert torch.equal(routing.weights, expected["sorted_weights"])
    # The released code leaves the order among equal experts open; ours takes the lower index first.
    lower_index_first = probs.argsort(dim=-1, descending=True, stable=True)
    assert torch.equal(routing.expert_ids, lower_index_first.masked_fill(~routing.used, 4))


# The worked example: two tokens, four experts, the numbers computed by hand from the definitions.
WORKED_LOGITS = torch.tensor([[2.0, 1.0, 0.5, -1.0], [0.2, 0.1, 0.0, -0.1]], dtype=torch.float64)
WORKED_PROBS = [[0.609460, 0.224208, 0.135989, 0.030343], [0.288651, 0.261183, 0.236328, 0.213838]]
DIGITS = {"rtol": 0, "atol": 1e-6}


def worked_example(**options: Any) -> Routing:
    return top_p(4, **options)(WORKED_LOGITS, RoutingContext(0))


def in_float32(routing: Routing) -> Routing:
    return routing._replace(logits=routing.logits.float(), probs=routing.probs.float())


def one_sequence() -> TokenWeights:
    return TokenWeights.build(None, None, (1, 2), torch.device("cpu"))


@pytest.mark.parametrize(
    ("p", "kept", "balance"), [(0.4, (1, 2), 2.281613), (0.7, (2, 3), 3.139320), (0.9, (3, 4), 3.755819)]
)
def test_worked_example(p: float, kept: tuple[int, int], balance: float) -> None:
    routing = worked_example(p=p)
    probs = torch.tensor(WORKED_PROBS, dtype=torch.float64)
    torch.testing.assert_close(routing.probs, probs, **DIGITS)
    for row, count in enumerate(kept):
        assert routing.expert_ids[row].tolist() == [*range(count), *[4] * (4 - count)]
        expected = probs[row].clone()
        expected[count:] = 0
        torch.testing.assert_close(routing.weights[row], expected, **DIGITS)
    loss = load_balance([in_float32(routing)], one_sequence())
    torch.testing.assert_close(loss, torch.tensor([balance]), **DIGITS)


def test_worked_example_renormalised() -> None:
    routing = worked_example(p=0.7, norm_topk_prob=True)
    expected = [[0.731059, 0.268941, 0.0, 0.0], [0.367165, 0.332225, 0.300610, 0.0]]
    torch.testing.assert_close(routing.weights, torch.tensor(expected, dtype=torch.float64), **DIGITS)


def test_worked_example_losses() -> None:
    routing = in_float32(worked_example(p=0.4))
    normalised = load_balance([routing], one_sequence(), normalize=True)
    torch.testing.assert_close(normalised, torch.tensor([1.521076]), **DIGITS)
    torch.testing.assert_close(entropy(routing, one_sequence()), torch.tensor(1.197237), **DIGITS)
    for row, expected in enumerate((1.014403, 1.380071)):
        token = Routing(*(None if field is None else field[row : row + 1] for field in routing))
        alone = TokenWeights.build(None, None, (1, 1), torch.device("cpu"))
        torch.testing.assert_close(entropy(token, alone), torch.tensor(expected), **DIGITS)


@pytest.mark.parametrize(
    ("probs", "p", "count"),
    [
        ((0.5, 0.25, 0.125, 0.125), 0.5, 2),
        ((0.5, 0.25, 0.125, 0.125), 0.75, 3),
        ((0.25, 0.25, 0.25, 0.25), 0.25, 2),
        ((0.25, 0.25, 0.25, 0.25), 0.5, 3),
        ((0.25, 0.25, 0.25, 0.25), 0.75, 4),
        ((0.5, 0.5, 0.0, 0.0), 0.5, 2),
        ((0.5, 0.5, 0.0, 0.0), 0.75, 2),
        ((1.0, 0.0, 0.0, 0.0), 0.0, 1),
        ((1.0, 0.0, 0.0, 0.0), 0.75, 1),
        ((1.0, 0.0, 0.0, 0.0), 1.0, 4),
    ],
)
def test_exact_ties_of_the_strict_rule(probs: tuple[float, ...], p: float, count: int) -> None:
    known = torch.tensor([probs], dtype=torch.float64).as_subclass(KnownProbabilities)
    routing = top_p(4, p=p)(known, RoutingContext(0))
    assert routing.expert_ids.tolist() == [[*range(count), *[4] * (4 - count)]]
    assert routing.weights.tolist() == [[*probs[:count], *[0.0] * (4 - count)]]
