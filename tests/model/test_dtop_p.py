"""DTop-p: standardised logits with a learnt scale, renormalised weights, a threshold that is state of the model.

Jin et al. 2025, arXiv 2512.13996. The control loop itself is in test_controllers.py.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model.controllers import gaussian_threshold
from dynmoe_hf.model.expert_selectors import TopP, TopPOptions
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.tiny import tiny_config, tiny_model, tokens

CONTEXT = RoutingContext(0)
PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
NO_LOSSES = {"load_balance": 0.0, "dynamic": 0.0}

thetas = st.floats(0.05, 8.0)
thresholds = st.floats(0.0, 0.999)


@st.composite
def logit_rows(draw: st.DrawFn) -> Tensor:
    """(T, E) float64."""
    num_experts = draw(st.integers(3, 10))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return draw(st.sampled_from([0.3, 1.0, 30.0])) * torch.randn(16, num_experts, generator=generator).double()


def selector(num_experts: int, theta: float = 1.0, **options: Any) -> TopP:
    options = {"norm_topk_prob": True, "standardize": True, **options}
    config = DynMoeConfig(num_experts=num_experts, routing={"method": "top_p", "selector": options})
    built = TopP(TopPOptions(**options), config)
    torch.nn.init.constant_(built.logit_norm.theta, theta)
    return built


def route(logits: Tensor, theta: float = 1.0, **options: Any) -> Routing:
    return selector(logits.shape[-1], theta, **options)(logits, CONTEXT)


@PROPERTY
@given(logits=logit_rows(), theta=thetas, p=thresholds)
def test_choice_and_weights_follow_the_rule(logits: Tensor, theta: float, p: float) -> None:
    routing = route(logits, theta, p=p)
    for token, row in enumerate(logits.tolist()):
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        scaled = torch.tensor([theta * (value - mean) / (variance + 1e-6) ** 0.5 for value in row]).double()
        probs = (scaled.exp() / scaled.exp().sum()).tolist()
        chosen, mass = [], 0.0
        for expert in sorted(range(len(row)), key=lambda expert: (-probs[expert], expert)):
            chosen.append(expert)
            mass += probs[expert]
            if mass > p:
                break
        assert routing.probs[token].tolist() == pytest.approx(probs, rel=1e-6)
        count = len(chosen)
        assert routing.expert_ids[token].tolist() == chosen + [len(row)] * (len(row) - count)
        weights = [probs[expert] / mass for expert in chosen] + [0.0] * (len(row) - count)
        assert routing.weights[token].tolist() == pytest.approx(weights, rel=1e-6)


@pytest.mark.parametrize(
    ("theta", "probs", "weights"),
    [
        (0.5, (0.420093, 0.264700, 0.210115, 0.105092), (0.613460, 0.386540)),
        (1.0, (0.584875, 0.232209, 0.146314, 0.036602), (1.0,)),
        (2.0, (0.816910, 0.128767, 0.051124, 0.003199), (1.0,)),
    ],
)
def test_worked_example(theta: float, probs: tuple[float, ...], weights: tuple[float, ...]) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.float64)
    standardised = selector(4).logit_norm(logits)
    assert standardised[0].tolist() == pytest.approx([1.270171, 0.346410, -0.115470, -1.501111], abs=1e-6)
    routing = route(logits, theta, p=0.5)
    assert routing.probs[0].tolist() == pytest.approx(probs, abs=1e-6)
    assert routing.expert_ids[0].tolist() == [*range(len(weights)), *[4] * (4 - len(weights))]
    assert routing.weights[0, : len(weights)].tolist() == pytest.approx(weights, abs=1e-6)


@PROPERTY
@given(logits=logit_rows(), factor=st.floats(0.5, 100), shift=st.floats(-50, 50), theta=thetas, p=thresholds)
def test_the_scale_and_the_mean_of_the_logits_do_not_matter(
    logits: Tensor, factor: float, shift: float, theta: float, p: float
) -> None:
    before, after = route(logits, theta, p=p), route(factor * logits + shift, theta, p=p)
    torch.testing.assert_close(after.probs, before.probs, rtol=1e-3, atol=1e-5)  # the eps of 1e-6 is left
    margins = (before.probs.sort(descending=True).values.cumsum(-1) - p).abs().amin(-1)
    clear = margins > 1e-4
    assert torch.equal(after.expert_ids[clear], before.expert_ids[clear])


@PROPERTY
@given(logits=logit_rows(), first=thetas, second=thetas, low=thresholds, high=thresholds)
def test_experts_fall_with_the_scale_and_rise_with_the_threshold(
    logits: Tensor, first: float, second: float, low: float, high: float
) -> None:
    sharp, flat = max(first, second), min(first, second)
    assert (route(logits, sharp, p=low).num_selected <= route(logits, flat, p=low).num_selected).all()
    few, many = (route(logits, first, p=p).selected().bool() for p in sorted((low, high)))
    assert (few <= many).all()


def test_a_constant_row_is_a_flat_distribution() -> None:
    logits = torch.full((3, 5), 7.25, requires_grad=True)
    routing = route(logits, p=0.5)
    torch.testing.assert_close(routing.probs, torch.full((3, 5), 0.2))
    assert (routing.num_selected == 3).all()
    routing.probs.square().sum().backward()
    assert logits.grad.isfinite().all()


def test_a_scale_that_falls_to_zero_or_below_keeps_the_order_of_the_experts() -> None:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = logits.argmax(-1)
    for theta in (0.0, -3.0):
        routing = route(logits, theta, p=0.0)
        assert torch.equal(routing.expert_ids[:, 0], best)
        torch.testing.assert_close(routing.probs, torch.full((40, 6), 1 / 6).double(), rtol=0.01, atol=0)


def test_a_cap_comes_before_the_count() -> None:
    model = tiny_model({"method": "dtop_p", "selector": {"max_experts": 2}, "controller": {"target": 4}}).train()
    for _ in range(30):
        model(tokens(2, 12))
        model.update_controllers()
    assert model(tokens(2, 12), output_routing=True).experts_per_token.tolist() == [2.0, 2.0]
    assert set(model.thresholds().values()) == {1.0}


@pytest.mark.parametrize("num_experts", [1, 2])
def test_fewer_than_three_experts_are_refused(num_experts: int) -> None:
    with pytest.raises(ValueError, match="standardize needs num_experts of 3 or more"):
        DynMoeConfig(num_experts=num_experts, routing="dtop_p")


def task_gradients(p: float, renormalised: bool) -> list[tuple[float, float]]:
    """Largest gradients of the task's loss alone in each MoE layer: of the scale, and of the router."""
    changes = {"norm_topk_prob": renormalised, "p": p}
    model = tiny_model({"method": "dtop_p", "selector": changes, "losses": NO_LOSSES}).train()
    model(tokens(4, 8), labels=tokens(4, 8)).loss.backward()
    parameters = [(block.selector.logit_norm.theta, block.gate.weight) for block in model.moe_blocks()]
    return [tuple(parameter.grad.abs().max().item() for parameter in pair) for pair in parameters]


def test_the_scale_learns_from_the_task_unless_every_token_has_one_renormalised_expert() -> None:
    for theta, gate in task_gradients(p=0.0, renormalised=True):
        assert theta < 1e-7 and gate < 1e-7  # zero by algebra; the rounding of a weight of 1 is left
    for p, renormalised in ((0.6, True), (0.6, False), (0.0, False)):
        for theta, gate in task_gradients(p, renormalised):
            assert theta > 1e-5 and gate > 1e-4


def test_the_scale_has_no_weight_decay() -> None:
    model = tiny_model("dtop_p")
    decayed = Trainer.get_decay_parameter_names(None, model)
    names = [f"model.layers.{layer}.mlp.selector.logit_norm.theta" for layer in (0, 2)]
    assert not set(names) & set(decayed)
    assert set(names) <= {name for name, _ in model.named_parameters()}
    assert "model.layers.0.mlp.gate.weight" in decayed


def test_the_entropy_loss_reads_the_standardised_distribution() -> None:
    model = tiny_model("dtop_p")
    for block in model.moe_blocks():
        torch.nn.init.constant_(block.selector.logit_norm.theta, 2.5)
    output = model(tokens(2, 8), labels=tokens(2, 8), output_routing=True)
    entropies = []
    for routing in output.routing:
        if routing is not None:
            logits = routing.logits
            standardised = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
            probs = (2.5 * standardised).softmax(-1)
            entropies.append(-(probs * probs.log()).sum(-1).mean())
    torch.testing.assert_close(output.aux_losses["dynamic"], torch.stack(entropies).mean(), rtol=1e-4, atol=0)
    expected = output.lm_loss + 1e-4 * output.aux_losses["load_balance"] + 1e-3 * output.aux_losses["dynamic"]
    torch.testing.assert_close(output.loss, expected)


def trained(routing: Any = "dtop_p", steps: int = 5) -> DynMoeForCausalLM:
    """A model whose thresholds and integral have left their start."""
    model = tiny_model(routing).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_on(model, optimizer, range(steps))
    return model.eval()


def train_on(model: DynMoeForCausalLM, optimizer: torch.optim.Optimizer, batches: range) -> list[dict[int, float]]:
    sequence = []
    for batch in batches:
        content = tokens(2, 12, seed=batch)
        model(content, labels=content).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_controllers()
        sequence.append(model.thresholds())
    return sequence


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_saved_and_loaded_state_goes_on_with_the_same_thresholds(tmp_path, scope: str) -> None:
    routing = {"method": "dtop_p", "controller": {"scope": scope}}
    model = trained(routing)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    controlled = {
        name: tuple(value.shape) for name, value in state.items() if "threshold" in name or "integral" in name
    }
    assert controlled == {
        "model.controller.integral": (2,) if scope == "layer" else (),
        "model.layers.0.mlp.selector.threshold": (),
        "model.layers.2.mlp.selector.threshold": (),
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.thresholds() == model.thresholds()
    assert set(model.thresholds().values()) != {gaussian_threshold(8, 2)}
    assert torch.equal(loaded(tokens(2, 8)).logits, model(tokens(2, 8)).logits)
    sequences = []
    for one in (model, loaded):
        sequences.append(train_on(one.train(), torch.optim.SGD(one.parameters(), lr=0.1), range(5, 10)))
    assert sequences[0] == sequences[1] and len({str(step) for step in sequences[0]}) == 5


def test_thresholds_stay_in_float32_in_a_bfloat16_model(tmp_path) -> None:
    model = trained()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.moe_blocks()[0].gate.weight.dtype == torch.bfloat16
    assert loaded.model.controller.integral.dtype == torch.float32
    assert loaded.model.controller.integral == model.model.controller.integral != 0
    assert loaded.moe_blocks()[0].selector.threshold.dtype == torch.float32
    assert loaded.thresholds() == model.thresholds()
    assert loaded.model.controller.initial == model.model.controller.initial


def test_a_frozen_threshold_serves_the_model_as_plain_top_p(tmp_path) -> None:
    model = trained()
    expected, thresholds = model(tokens(2, 8)).logits, model.thresholds()
    assert thresholds[0] == thresholds[2]
    model.set_routing(controller="none", selector={"p": thresholds[0]})
    assert torch.equal(model(tokens(2, 8)).logits, expected)
    assert model.config.routing["method"] == "top_p"
    assert model.model.controller is None and model.thresholds() == {}
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "threshold" in name or "integral" in name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(loaded(tokens(2, 8)).logits, expected)
    model.train()(tokens(2, 8))
    model.update_controllers()  # nothing to move
    model.eval().set_routing(selector={"p": 0.0})
    assert model(tokens(2, 8), output_routing=True).experts_per_token.tolist() == [1.0, 1.0]


def test_thresholds_of_single_layers_can_be_frozen_each() -> None:
    model = trained({"method": "dtop_p", "controller": {"scope": "layer"}})
    expected, thresholds = model(tokens(2, 8)).logits, model.thresholds()
    assert thresholds[0] != thresholds[2]
    for layer, p in thresholds.items():
        model.set_routing(layers=[layer], controller="none", selector={"p": p})
    assert torch.equal(model(tokens(2, 8)).logits, expected)
    assert model.model.controller is None


def test_a_threshold_is_not_set_while_it_is_controlled(tmp_path) -> None:
    model = trained()
    before = (model.config.to_dict(), model.thresholds())
    for layers in (None, [2]):
        with pytest.raises(ValueError, match="controller to 'none' together with p"):
            model.set_routing(layers=layers, selector={"p": 0.2})
    with pytest.raises(ValueError, match="which only a controller can set"):
        model.set_routing(controller="none")
    assert (model.config.to_dict(), model.thresholds()) == before
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="controller to 'none' together with p"):
        AutoModelForCausalLM.from_pretrained(tmp_path, routing={"selector": {"p": 0.2}})
    frozen = AutoModelForCausalLM.from_pretrained(tmp_path, routing={"controller": "none", "selector": {"p": 0.0}})
    assert frozen(tokens(2, 8), output_routing=True).experts_per_token.tolist() == [1.0, 1.0]


def test_a_new_target_keeps_the_state_of_the_loop() -> None:
    model = trained()
    integral, thresholds = model.model.controller.integral.clone(), model.thresholds()
    model.set_routing(controller={"target": 3})
    assert model.model.controller.integral == integral and model.thresholds() == thresholds
    with model.routing_override(controller="none", selector={"p": 0.0}):
        assert model(tokens(2, 8), output_routing=True).experts_per_token.tolist() == [1.0, 1.0]
    assert model.model.controller.integral == integral and model.thresholds() == thresholds


def test_an_optimizer_keeps_the_scale_when_the_target_changes() -> None:
    model = tiny_model("dtop_p").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.set_routing(controller={"target": 3})
    train_on(model, optimizer, range(1))
    assert all(block.selector.logit_norm.theta != 1 for block in model.moe_blocks())


def test_a_top_p_checkpoint_becomes_a_controlled_model(tmp_path) -> None:
    before = tiny_model("top_p")
    before.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, routing="dtop_p")
    assert model.thresholds() == {layer: gaussian_threshold(8, 2) for layer in (0, 2)}
    assert [block.selector.logit_norm.theta.item() for block in model.moe_blocks()] == [1.0, 1.0]
    assert torch.equal(model.moe_blocks()[1].gate.weight, before.moe_blocks()[1].gate.weight)


@pytest.mark.parametrize("start", [None, 0.9])
def test_a_new_model_starts_at_the_given_threshold_or_near_its_target(start: float | None) -> None:
    config = tiny_config({"method": "dtop_p", "selector": {"p": start}, "controller": {"target": 3}}, num_experts=32)
    model = tiny_model(config=config)
    expected = gaussian_threshold(32, 3) if start is None else start
    assert model.thresholds() == {layer: pytest.approx(expected) for layer in (0, 2)}
    if start is None:
        used = model(tokens(8, 32), output_routing=True).experts_per_token
        torch.testing.assert_close(used, torch.full((2,), 3.0), rtol=0.2, atol=0)


def test_layers_with_other_experts_share_one_loop() -> None:
    """A global threshold over layers whose experts differ: the error is the mean of theirs, each over its own E."""
    changes = {2: {"experts": "cartesian", "selector": {"p": 0.7}}}
    model = tiny_model({"method": "dtop_p", "selector": {"p": 0.4}}, layer_routing=changes)
    assert model.thresholds() == {0: pytest.approx(0.4), 2: pytest.approx(0.7)}
    _, _, first, second = (routing for routing in model(tokens(2, 12), output_routing=True).routing)
    used = model(tokens(2, 12), output_routing=True).experts_per_token[0].item()
    pairs = (first.num_selected * second.num_selected).float().mean().item()
    moved = 0.6 * ((2 - used) / 8 + (2 - pairs) / 64) / 2
    model.train()(tokens(2, 12))
    model.update_controllers()
    assert model.thresholds() == {0: pytest.approx(0.4 + moved), 2: pytest.approx(0.7 + moved)}


def test_sharding_of_parameters_accepts_the_scale() -> None:
    """FSDP refuses parameters without a dimension."""
    assert all(parameter.ndim > 0 for parameter in tiny_model("dtop_p").parameters())


def test_experts_of_a_layer_with_a_small_scale_take_the_budget_of_the_others() -> None:
    """One global threshold: the learnt scales decide which layer uses how much of the budget."""
    model = tiny_model({"method": "dtop_p", "controller": {"target": 3}}).train()
    for block, theta in zip(model.moe_blocks(), (0.4, 2.0), strict=True):
        torch.nn.init.constant_(block.selector.logit_norm.theta, theta)
    for _ in range(60):
        model(tokens(4, 16))
        model.update_controllers()
    first, last = model(tokens(4, 16), output_routing=True).experts_per_token.tolist()
    assert (first + last) / 2 == pytest.approx(3, rel=0.05)
    assert first > last + 1


def test_block_output_by_hand() -> None:
    model = tiny_model("dtop_p", num_shared_experts=0)
    block = model.moe_blocks()[0]
    torch.nn.init.constant_(block.selector.logit_norm.theta, 0.7)
    hidden_states = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(2))
    output, routing = block(hidden_states, CONTEXT)
    logits = hidden_states[0] @ block.gate.weight.T
    centred = logits - logits.mean(-1, keepdim=True)
    probs = (0.7 * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()).softmax(-1)
    gates = probs * routing.selected()
    gates = gates / gates.sum(-1, keepdim=True)
    halves = torch.einsum("td,eid->tei", hidden_states[0], block.experts.gate_up_proj).chunk(2, dim=-1)
    experts = torch.einsum("tei,edi->ted", F.silu(halves[0]) * halves[1], block.experts.down_proj)
    torch.testing.assert_close(output[0], torch.einsum("te,ted->td", gates, experts), rtol=1e-4, atol=1e-5)
    assert len(routing.num_selected.unique()) > 1
