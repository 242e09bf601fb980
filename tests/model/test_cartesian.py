"""What CartesianMoE promises (Su et al. 2024, arXiv 2410.16077), against plain loops and flat mixtures of experts."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.model.attention import DynMoeRMSNorm
from dynmoe_hf.model.blocks import DynMoeBlock, DynMoeCartesianBlock
from dynmoe_hf.model.expert_selectors import TopK, TopKOptions
from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.modeling_dynmoe import build_experts
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.tiny import ENGINES, greedy, tiny_config, tiny_model, tokens

CONTEXT = RoutingContext(0)
COMPOSITIONS = ("prenorm", "prenorm_input_residual", "nested", "postnorm", "postnorm_input_residual")
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EPS = 1e-6


def cartesian(selector: dict | None = None, losses: dict | None = None, **experts: Any) -> dict[str, Any]:
    return {"method": "cartesian", "selector": selector or {}, "losses": losses or {}, "experts": experts}


def make_layer(
    routing: Any = "cartesian", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> tuple[DynMoeCartesianBlock, nn.Module]:
    """The FFN half of a layer with random weights, and the layer's own norm."""
    config = tiny_config(routing, rms_norm_eps=EPS, experts_implementation="eager", **changes)
    block = DynMoeCartesianBlock(config, 0, build_experts).to(dtype)
    outer_norm = DynMoeRMSNorm(config.hidden_size, EPS).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (*block.parameters(), *outer_norm.parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.4 * noise)
    return block.eval(), outer_norm


def stream(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    """A residual stream whose components differ in size."""
    return 2 * torch.randn(*shape, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers and norms work in float32 whatever the model's dtype; here they do so in float64 too."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / ((x * x).mean() + EPS).sqrt()


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    activation = gate @ x
    return down @ (activation / (1 + (-activation).exp()) * (up @ x))


def plain_bank(parameters: dict[str, Tensor], bank: int, x: Tensor, k: int, renormalised: bool) -> Tensor:
    """Routed and shared sub-experts of one token (D,)."""
    own = {name.removeprefix(f"sub_layers.{bank}."): value for name, value in parameters.items()}
    scores = (own["gate.weight"] @ x).exp()
    probs = scores / scores.sum()
    chosen = sorted(range(len(probs)), key=lambda expert: (-probs[expert].item(), expert))[:k]
    total = sum(probs[expert] for expert in chosen) if renormalised else 1.0
    output = torch.zeros_like(x)
    for expert in chosen:
        gate, up = own["experts.gate_up_proj"][expert].chunk(2)
        output = output + probs[expert] / total * swiglu(x, gate, up, own["experts.down_proj"][expert])
    shared = [own.get(f"shared_experts.{name}_proj.weight") for name in ("gate", "up", "down")]
    return output if shared[0] is None else output + swiglu(x, *shared)


def plain_layer(
    parameters: dict[str, Tensor], x: Tensor, composition: str, k: tuple[int, int] = (2, 2), renormalised: bool = False
) -> Tensor:
    """One token (D,) through the layer, written as the compositions are defined."""

    def outer(y: Tensor) -> Tensor:
        return rms_norm(y, parameters["outer_norm.weight"])

    a = plain_bank(parameters, 0, x if composition.startswith("postnorm") else outer(x), k[0], renormalised)
    n = rms_norm(a if composition == "nested" else x + a, parameters["inner_norm.weight"])
    b = plain_bank(parameters, 1, n, k[1], renormalised)
    return {
        "prenorm": x + a + b,
        "prenorm_input_residual": x + b,
        "nested": x + b,
        "postnorm": outer(n + b),
        "postnorm_input_residual": outer(x + b),
    }[composition]


def plain_parameters(block: DynMoeCartesianBlock, outer_norm: nn.Module) -> dict[str, Tensor]:
    named = {**dict(block.named_parameters()), "outer_norm.weight": outer_norm.weight}
    return {name: value.detach().clone().requires_grad_() for name, value in named.items()}


VARIANTS = {
    "raw": ({}, {}, (2, 2), False),
    "renormalised": ({"selector": {"norm_topk_prob": True}}, {}, (2, 2), True),
    "three of A, one of B": ({"selector": {"k": 3}, "second_selector": {"k": 1}}, {}, (3, 1), False),
    "no shared sub-experts": ({}, {"num_shared_experts": 0}, (2, 2), False),
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_every_composition_is_a_plain_loop(composition: str, variant: str) -> None:
    """Outputs, and the gradients of the input and of every parameter."""
    routing, changes, k, renormalised = VARIANTS[variant]
    block, outer_norm = make_layer(cartesian(composition=composition, **routing), **changes)
    parameters = plain_parameters(block, outer_norm)
    inputs, plain_inputs = stream(1, 5).requires_grad_(), stream(5).requires_grad_()
    output, routings = block(inputs, outer_norm, CONTEXT)
    plain = torch.stack([plain_layer(parameters, x, composition, k, renormalised) for x in plain_inputs])
    torch.testing.assert_close(output[0], plain, rtol=1e-12, atol=1e-11)
    assert [routing.expert_ids.shape[1] for routing in routings] == list(k)

    probe = stream(5, seed=4)
    (output[0] * probe).sum().backward()
    (plain * probe).sum().backward()
    torch.testing.assert_close(inputs.grad[0], plain_inputs.grad, rtol=1e-10, atol=1e-10)
    ours = {**dict(block.named_parameters()), "outer_norm.weight": outer_norm.weight}
    for name, parameter in ours.items():
        assert parameters[name].grad.any(), f"{name} was to have a gradient"
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-10, atol=1e-10, msg=name)


# D=2, three sub-experts a bank, two of each, width 1; a sub-expert is its gate row, up row and down column.
WORKED = {
    0: (
        [[1, 0], [0, 1], [-1, 0]],
        [([1, 0], [0, 1], [1, 0]), ([0, 1], [1, 0], [0, 1]), ([1, 1], [1, -1], [1, 1])],
        ([0.5, 0.5], [0.5, -0.5], [1, 1]),
    ),
    1: (
        [[0, 1], [1, 0], [0, -1]],
        [([1, 0], [1, 0], [0, 1]), ([0, 1], [0, 1], [1, 0]), ([1, -1], [1, 1], [1, -1])],
        ([1, 0], [0, 1], [0.5, 0.5]),
    ),
}
WORKED_PROBS = {
    False: ([0.398388, 0.528619, 0.072993], [0.541598, 0.402688, 0.055715]),
    True: ([0.398388, 0.528619, 0.072993], [0.541688, 0.402605, 0.055706]),
}
WORKED_WEIGHTS = {
    False: ([0.528619, 0.398388], [0.541598, 0.402688]),
    True: ([0.570243, 0.429757], [0.573644, 0.426356]),
}
WORKED_STEPS = {
    False: {
        "n1": [0.848528, 1.131371],
        "a": [0.165744, 0.281626],
        "n2": [0.840779, 1.137142],
        "b": [0.728233, 0.601452],
    },
    True: {
        "n1": [0.848528, 1.131371],
        "a": [0.186832, 0.311839],
        "n2": [0.840565, 1.137299],
        "b": [0.751478, 0.617056],
    },
}
WORKED_OUTPUT = {False: [3.893978, 4.883078], True: [3.938311, 4.928895]}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("renormalised", [False, True])
def test_worked_example(renormalised: bool) -> None:
    config = DynMoeConfig(
        hidden_size=2,
        num_attention_heads=1,
        moe_intermediate_size=1,
        num_experts=3,
        rms_norm_eps=EPS,
        routing=cartesian({"norm_topk_prob": renormalised}),
        experts_implementation="eager",
    )
    block = DynMoeCartesianBlock(config, 0, build_experts).double()
    steps: dict[str, Tensor] = {}
    for sub_layer, (router, experts, shared), names in zip(
        block.sub_layers, WORKED.values(), (("n1", "a"), ("n2", "b")), strict=True
    ):
        rows = torch.tensor(experts, dtype=torch.float64)  # (expert, part, D)
        gate, up, down = torch.tensor(shared, dtype=torch.float64)
        state = {"gate.weight": torch.tensor(router), "experts.gate_up_proj": rows[:, :2]}
        state |= {"experts.down_proj": rows[:, 2, :, None], "shared_experts.down_proj.weight": down[:, None]}
        state |= {"shared_experts.gate_proj.weight": gate[None], "shared_experts.up_proj.weight": up[None]}
        sub_layer.load_state_dict(state)
        sub_layer.register_forward_hook(
            lambda _, inputs, output, names=names: steps.update({names[0]: inputs[0], names[1]: output[0]})
        )
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    output, routings = block(x, DynMoeRMSNorm(2, EPS).double(), CONTEXT)
    digits = {"rtol": 0, "atol": 1e-6}
    for routing, probs, weights, ids in zip(
        routings, WORKED_PROBS[renormalised], WORKED_WEIGHTS[renormalised], ([1, 0], [0, 1]), strict=True
    ):
        torch.testing.assert_close(routing.probs[0], torch.tensor(probs, dtype=torch.float64), **digits)
        torch.testing.assert_close(routing.weights[0], torch.tensor(weights, dtype=torch.float64), **digits)
        assert routing.expert_ids.tolist() == [ids]
    for name, value in WORKED_STEPS[renormalised].items():
        torch.testing.assert_close(steps[name].flatten(), torch.tensor(value, dtype=torch.float64), **digits)
    expected = torch.tensor(WORKED_OUTPUT[renormalised], dtype=torch.float64)
    torch.testing.assert_close(output.flatten(), expected, **digits)


def flat_block(sub_layer: DynMoeBlock, **changes: Any) -> DynMoeBlock:
    """A mixture of experts of the plain top-k method with the weights of one bank."""
    routing = {"method": "top_k", "selector": {"k": 2, "norm_topk_prob": False}}
    block = DynMoeBlock(tiny_config(routing, experts_implementation="eager", **changes), 0, build_experts)
    block.double().load_state_dict(sub_layer.state_dict())
    return block.eval()


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_bank_leaves_a_flat_layer_of_the_other(silent: int) -> None:
    """Without bank B, prenorm is a pre-norm layer of bank A; without bank A, one of bank B whose norm is the inner."""
    block, outer_norm = make_layer()
    with torch.no_grad():
        block.sub_layers[silent].experts.down_proj.zero_()
        block.sub_layers[silent].shared_experts.down_proj.weight.zero_()
    x = stream(2, 6)
    output, _ = block(x, outer_norm, CONTEXT)
    norm = block.inner_norm if silent == 0 else outer_norm
    alone, routing = flat_block(block.sub_layers[1 - silent])(norm(x), CONTEXT)
    torch.testing.assert_close(output, x + alone, rtol=1e-12, atol=1e-12)
    assert alone.abs().mean() > 0.1 and len(routing.expert_ids.unique()) == 8


def num_parameters(config: DynMoeConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_as_many_parameters_as_the_flat_fine_grained_twin(num_shared_experts: int) -> None:
    """2e experts of the sub-experts' width and a shared one of twice that width; only the inner norms are more."""
    ours = tiny_config("cartesian", num_shared_experts=num_shared_experts)
    twin = tiny_config("top_k", num_experts=16, num_experts_per_tok=4, num_shared_experts=2 * num_shared_experts)
    assert num_parameters(ours) - num_parameters(twin) == 2 * ours.hidden_size


@pytest.mark.parametrize("renormalised", [False, True])
def test_exactly_k_sub_experts_of_each_bank_run(renormalised: bool) -> None:
    selector = {"k": 3, "norm_topk_prob": renormalised}
    block, outer_norm = make_layer(cartesian(selector, second_selector={"k": 1}))
    ran: list[Tensor] = []
    for sub_layer in block.sub_layers:
        sub_layer.experts.register_forward_pre_hook(lambda _, inputs: ran.append(inputs[1]))
    _, routings = block(stream(2, 6), outer_norm, CONTEXT)
    for routing, expert_ids, k in zip(routings, ran, (3, 1), strict=True):
        assert expert_ids.shape == (12, k) and (routing.num_selected == k).all()
        assert all(len(row.unique()) == k for row in expert_ids)
        assert torch.equal((routing.weights.sum(-1) - 1).abs() < 1e-6, torch.full((12,), renormalised))


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("bank", [0, 1])
def test_permuting_the_sub_experts_of_a_bank_leaves_the_output(bank: int) -> None:
    block, outer_norm = make_layer()
    before, _ = block(stream(2, 6), outer_norm, CONTEXT)
    permutation = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    sub_layer = block.sub_layers[bank]
    with torch.no_grad():
        for parameter in (sub_layer.gate.weight, sub_layer.experts.gate_up_proj, sub_layer.experts.down_proj):
            parameter.copy_(parameter[permutation].clone())
    after, _ = block(stream(2, 6), outer_norm, CONTEXT)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_what_the_logits_of_each_router_depend_on(composition: str) -> None:
    """Router A on nothing of bank B; router B on its own weight, the inner norm and all of bank A."""
    block, outer_norm = make_layer(cartesian(composition=composition))
    _, routings = block(stream(2, 12), outer_norm, CONTEXT)
    reached = []
    for routing in routings:
        block.zero_grad()
        (routing.logits * stream(24, seed=5)[:, :8]).sum().backward(retain_graph=True)
        reached.append(
            {name for name, value in block.named_parameters() if value.grad is not None and value.grad.any()}
        )
    bank_a = {name for name, _ in block.named_parameters() if name.startswith("sub_layers.0.")}
    assert reached == [{"sub_layers.0.gate.weight"}, bank_a | {"sub_layers.1.gate.weight", "inner_norm.weight"}]


@pytest.mark.parametrize("scope", ["sequence", "micro"])
def test_uniform_load_costs_k_in_each_bank(scope: str) -> None:
    """Every token's logits in all their rotations, so that usage and mean probability are the same for all."""
    row = torch.randn(6, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([row.roll(step) for step in range(6)])
    weights = TokenWeights.build(None, None, (1, 6), torch.device("cpu"))
    for k in (1, 2, 3):
        config = DynMoeConfig(num_experts=6, routing="top_k")
        routing = TopK(TopKOptions(k=k, norm_topk_prob=False), config)(logits, CONTEXT)
        torch.testing.assert_close(load_balance([routing], weights, scope=scope), torch.tensor([float(k)]))


def switch_loss(routing: Routing, rows: slice) -> float:
    """E sum_e f_e P_e of the tokens in `rows`, one after the other."""
    usage, probability = [0.0] * 8, [0.0] * 8
    tokens_ = range(*rows.indices(len(routing.probs)))
    for token in tokens_:
        for expert in routing.expert_ids[token].tolist():
            usage[expert] += 1 / len(tokens_)
        for expert in range(8):
            probability[expert] += routing.probs[token, expert].item() / len(tokens_)
    return 8 * sum(f * p for f, p in zip(usage, probability, strict=True))


def test_losses_of_the_banks_are_added_before_the_mean_over_layers() -> None:
    model = tiny_model(cartesian(losses={"load_balance": 0.3}))
    content = tokens(1, 9)
    output = model(content, labels=content, output_routing=True)
    first_a, first_b, dense, last_a, last_b = output.routing
    assert dense is None
    banks = [switch_loss(routing, slice(None)) for routing in (first_a, first_b, last_a, last_b)]
    assert output.aux_losses["load_balance"].item() == pytest.approx(sum(banks) / 2, rel=1e-5)
    assert (output.loss - output.lm_loss).item() == pytest.approx(0.3 * sum(banks) / 2, rel=1e-4)


def test_padding_counts_in_no_balance_loss() -> None:
    model = tiny_model(cartesian(losses={"load_balance": 1.0}), balance_scope="micro")
    content = tokens(1, 9)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    labels = content.masked_fill(mask == 0, -100)
    output = model(content, attention_mask=mask, labels=labels, output_routing=True)
    routings = [routing for routing in output.routing if routing is not None]
    expected = sum(switch_loss(routing, slice(3, 9)) for routing in routings) / 2
    assert output.aux_losses["load_balance"].item() == pytest.approx(expected, rel=1e-5)


def test_the_balance_loss_trains_both_routers() -> None:
    model = tiny_model(cartesian(losses={"load_balance": 1.0}))
    output = model(tokens(2, 8), labels=tokens(2, 8))
    output.aux_losses["load_balance"].backward()
    sizes = [block.gate.weight.grad.abs().max().item() for block in model.moe_blocks()]
    assert len(sizes) == 4 and min(sizes) > 1e-4


@PROPERTY
@given(seed=st.integers(0, 2**20), k=st.integers(1, 6), renormalised=st.booleans(), ties=st.booleans())
def test_disable_top1_chooses_the_best_k_of_the_others(seed: int, k: int, renormalised: bool, ties: bool) -> None:
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    selector = TopK(TopKOptions(k=k, norm_topk_prob=renormalised, disable_top1=True), DynMoeConfig(num_experts=7))
    ranked = sorted_experts(logits)
    for training in (False, True):
        routing = selector.train(training)(logits, CONTEXT)
        start = 0 if training else 1
        expected = torch.tensor([row[start : start + k] for row in ranked])
        assert torch.equal(routing.expert_ids, expected)
        weights = logits.softmax(-1).gather(1, expected)
        weights = weights / weights.sum(-1, keepdim=True) if renormalised else weights
        torch.testing.assert_close(routing.weights, weights)
        torch.testing.assert_close(routing.probs, logits.softmax(-1))


def sorted_experts(scores: Tensor) -> list[list[int]]:
    """The experts of each token, the best first and equal ones by index."""
    return [sorted(range(len(row)), key=lambda expert: (-row[expert], expert)) for row in scores.tolist()]


def test_disable_top1_is_a_switch_of_a_built_model_and_holds_in_both_banks() -> None:
    model = tiny_model("cartesian")
    content = tokens(2, 8)
    before = model(content, output_routing=True)
    with model.routing_override(selector={"disable_top1": True}):
        without = model(content, output_routing=True)
        in_training = model.train()(content, output_routing=True)
        model.eval()
    for routing in (routing for routing in without.routing if routing is not None):
        ranked = torch.tensor(sorted_experts(routing.probs))
        assert torch.equal(routing.expert_ids, ranked[:, 1:3])
    assert not torch.equal(without.logits, before.logits)
    torch.testing.assert_close(in_training.logits, before.logits, rtol=0, atol=0)
    torch.testing.assert_close(model(content).logits, before.logits, rtol=0, atol=0)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_cached_generation_equals_the_full_forward(composition: str) -> None:
    model = tiny_model(cartesian(composition=composition))
    prompt = tokens(2, 5)
    generated = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, greedy(model, prompt, 5))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_and_checkpointing_give_what_the_reference_gives(engine: str, checkpointing: bool) -> None:
    results = []
    for name in ("reference", engine):
        model = tiny_model(cartesian(second_selector={"k": 3}), name).train()
        if checkpointing and name == engine:
            model.gradient_checkpointing_enable()
        loss = model(tokens(2, 8), labels=tokens(2, 8)).loss
        loss.backward()
        results.append((loss.detach(), {key: value.grad for key, value in model.named_parameters()}))
    (expected, expected_gradients), (loss, gradients) = results
    torch.testing.assert_close(loss, expected, **CLOSE)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("k", "num_shared_experts"), [((2, 2), 1), ((3, 1), 1), ((2, 2), 0)])
def test_floating_point_operations_are_those_of_the_formula(k: tuple[int, int], num_shared_experts: int) -> None:
    """2 x 2 D e for the routers, and 6 D I for every sub-expert that runs, shared ones too; counted as it runs."""
    routing = cartesian({"k": k[0]}, second_selector={"k": k[1]})
    block, outer_norm = make_layer(routing, num_shared_experts=num_shared_experts)
    hidden_size, width, num_experts, num_tokens = 32, 24, 8, 12
    with FlopCounterMode(display=False) as counter:
        block(stream(1, num_tokens), outer_norm, CONTEXT)
    running = sum(k) + 2 * num_shared_experts
    expected = 4 * hidden_size * num_experts + running * 6 * hidden_size * width
    assert counter.get_total_flops() == num_tokens * expected


def test_router_logits_have_two_entries_a_layer() -> None:
    model = tiny_model("cartesian")
    output = model(tokens(2, 8), output_router_logits=True, output_routing=True)
    routings = [routing for routing in output.routing if routing is not None]
    assert len(output.router_logits) == len(routings) == len(output.experts_per_token) == 4
    for logits, routing in zip(output.router_logits, routings, strict=True):
        assert torch.equal(logits, routing.logits)
    places = [(block.layer_idx, block.bank) for block in model.moe_blocks()]
    assert places == [(0, 0), (0, 1), (2, 0), (2, 1)]


def test_names_and_shapes_of_the_parameters() -> None:
    state = tiny_model("cartesian").model.layers[0].mlp.state_dict()
    one = {
        "gate.weight": (8, 32),
        "experts.gate_up_proj": (8, 48, 32),
        "experts.down_proj": (8, 32, 24),
        "shared_experts.gate_proj.weight": (24, 32),
        "shared_experts.up_proj.weight": (24, 32),
        "shared_experts.down_proj.weight": (32, 24),
    }
    expected = {f"sub_layers.{bank}.{name}": shape for bank in (0, 1) for name, shape in one.items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == {**expected, "inner_norm.weight": (32,)}


def test_initialisation_and_defaults_of_the_method() -> None:
    torch.manual_seed(0)
    config = tiny_config("cartesian", hidden_size=256, num_shared_experts=None, initializer_range=0.02)
    assert config.num_shared_experts == 1 and config.num_experts_per_tok == 2
    for layer in AutoModelForCausalLM.from_config(config).model.layers[::2]:
        assert (layer.mlp.inner_norm.weight == 1).all()
        for name, parameter in layer.mlp.named_parameters():
            assert parameter.ndim == 1 or parameter.std().item() == pytest.approx(0.02, rel=0.1), name


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (cartesian(composition="sandwich"), "composition"),
        (cartesian(bank={"type": "cartesian"}), "Unknown bank type 'cartesian'"),
        (cartesian(bank={"type": "swiglu", "rank": 4}), "Unknown key in bank"),
        (cartesian(second_selector={"p": 0.4}), "Unknown key in routing.selector: 'p'"),
        (cartesian(second_selector={"k": 9}), "k must be between 1 and num_experts"),
        (cartesian({"k": 8, "disable_top1": True}), "k=8 is more than the 7 experts"),
    ],
)
def test_refused_options(routing: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(routing)
