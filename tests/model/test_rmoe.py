"""What is particular to routers joined by a recurrent state (RMoE, Qiu et al. 2024, arXiv 2408.06793)."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.routing import Routing, RoutingContext
from dynmoe_hf.model.scorers import RecurrentCore, RecurrentOptions
from tests.model import plain_rmoe
from tests.model.plain_rmoe import Tensors, pooled_balance, top_k
from tests.tiny import tiny_config, tiny_model, tokens

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
GATES = {"gru": "rzn", "rnn": "n", "lstm": "ifgo"}
TORCH_CELLS = {"gru": nn.GRUCell, "rnn": nn.RNNCell, "lstm": nn.LSTMCell}
SPARSE = ["sparse"] * 4
CHAINS: dict[str, dict[str, Any]] = {
    "gru": {},
    "rnn": {"cell": "rnn"},
    "lstm": {"cell": "lstm"},
    "no state": {"recurrent_state": "none"},
    "lstm, no state": {"cell": "lstm", "recurrent_state": "none"},
    "detached": {"recurrent_state": "detach"},
    "lstm, detached": {"cell": "lstm", "recurrent_state": "detach"},
    "shared projector": {"projector": "shared"},
    "residual": {"logit_residual_alpha": 0.5},
    "residual without state": {"recurrent_state": "none", "logit_residual_alpha": 1.0},
    "residual detached": {"recurrent_state": "none", "logit_residual_alpha": 1.0, "detach_logit_residual": True},
    "lstm with residual": {"cell": "lstm", "logit_residual_alpha": -0.5, "detach_logit_residual": True},
}


def rmoe(**scorer: Any) -> dict[str, Any]:
    return {"method": "rmoe", "scorer": {"size": 6, **scorer}}


def chain_model(layers: list[str] = SPARSE, config: dict[str, Any] | None = None, **scorer: Any) -> DynMoeForCausalLM:
    sizes = {"num_hidden_layers": len(layers), "mlp_layer_types": layers, "num_shared_experts": 0}
    return tiny_model(rmoe(**scorer), **(sizes | (config or {})))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cell_weights(core: RecurrentCore) -> Tensors:
    """The parameters of a cell, one tensor a gate, in float64; gradient flows back to the parameters."""
    gates = GATES[core.options.cell]
    return {
        f"{name[:-1]}{gate}": part
        for name, value in core.cell.named_parameters()
        for gate, part in zip(gates, value.double().chunk(len(gates)), strict=True)
    }


def plain_chain(model: DynMoeForCausalLM, inputs: list[Tensor], routers: list[int] | None = None) -> list[Tensors]:
    """States and logits of these routers, or all, for the given inputs of their layers (T, D), in float64."""
    blocks = model.moe_blocks()
    core = model.model.shared_scorers["recurrent"]
    options, weights = core.options, cell_weights(core)
    zeros = inputs[0].new_zeros(len(inputs[0]), options.size, dtype=torch.float64)
    state = memory = zeros
    logits = None
    record = []
    for router, hidden in zip(range(len(blocks)) if routers is None else routers, inputs, strict=True):
        block = blocks[router]
        projection = core.in_proj if options.projector == "shared" else block.gate.in_proj
        if options.recurrent_state == "none":
            state = memory = zeros
        elif options.recurrent_state == "detach":
            state, memory = state.detach(), memory.detach()
        carried = (state, memory) if options.cell == "lstm" else (state,)
        step = getattr(plain_rmoe, options.cell)(weights, hidden.double() @ projection.double().T, *carried)
        state, memory = step["h"], step.get("memory", zeros)
        own = state @ block.gate.out_proj.double().T
        if options.logit_residual_alpha and logits is not None:
            before = logits.detach() if options.detach_logit_residual else logits
            own = own + options.logit_residual_alpha * before
        logits = own
        record.append({**step, "logits": logits})
    return record


def our_chain(model: DynMoeForCausalLM, inputs: list[Tensor]) -> list[Routing]:
    """The routers alone, one after the other, each with its own inputs (T, D)."""
    state, routings = None, []
    for block, hidden in zip(model.moe_blocks(), inputs, strict=True):
        core = model.model.shared_scorers["recurrent"]
        routings.append(block.route(hidden, RoutingContext(block.layer_idx, state=state, shared=core)))
        state = routings[-1].state
    return routings


def recorded_inputs(model: DynMoeForCausalLM, input_ids: Tensor) -> tuple[list[Tensor], Any]:
    """Run the model; the FFN inputs (T, D) of its MoE layers, and its output."""
    seen: list[Tensor] = []
    for block in model.moe_blocks():
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach().flatten(0, 1)))
    return seen, model(input_ids, output_routing=True)


def sparse(routings: tuple[Routing | None, ...]) -> list[Routing]:
    return [routing for routing in routings if routing is not None]


# The worked example: two layers, one token, four experts; the numbers computed by hand from the definitions.
EYE = torch.eye(2)
WORKED_INPUTS = [torch.tensor([[1.0, -0.5]]), torch.tensor([[0.8, 0.6]])]
FIRST = {
    "r": (0.645656, 0.462570),
    "z": (0.524979, 0.450166),
    "n": (0.810722, -0.386336),
    "h": (0.385110, -0.212421),
    "logits": (0.770219, -0.424841, -0.770219, 0.424841),
    "probs": (0.449453, 0.136043, 0.096312, 0.318192),
    "weights": {0: 0.585496, 3: 0.414504},
}
SECOND = {
    "r": (0.583829, 0.444914),
    "z": (0.523865, 0.429540),
    "n": (0.541801, -0.499636),
    "h": (0.459716, -0.376265),
    "logits": (0.125176, 1.253972, -1.253972, -0.125176),
    "probs": (0.195227, 0.603627, 0.049157, 0.151989),
    "weights": {1: 0.755617, 0: 0.244383},
}
SECOND_WITHOUT_STATE = {
    "r": (0.574443, 0.450166),
    "z": (0.495000, 0.445221),
    "n": (0.473745, -0.469919),
    "h": (0.239241, -0.260701),
    "logits": (-0.032190, 0.749914, -0.749914, 0.032190),
    "probs": (0.210951, 0.461154, 0.102915, 0.224979),
    "weights": {1: 0.672106, 3: 0.327894},
}
WORKED = {"pass": [FIRST, SECOND], "none": [FIRST, SECOND_WITHOUT_STATE]}
DIGITS = {"rtol": 0, "atol": 2e-6}


def worked_model(recurrent_state: str) -> DynMoeForCausalLM:
    sizes = {"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "num_experts": 4}
    model = chain_model(["sparse"] * 2, sizes, size=2, recurrent_state=recurrent_state)
    first, second = (block.gate for block in model.moe_blocks())
    cell = model.model.shared_scorers["recurrent"].cell
    with torch.no_grad():
        cell.weight_ih.copy_(torch.cat([0.5 * EYE, 0.2 * EYE, EYE]))
        cell.weight_hh.copy_(torch.cat([0.1 * EYE, 0.3 * EYE, 0.4 * EYE]))
        cell.bias_ih.copy_(torch.tensor([0.1, 0.1, 0, 0, 0, 0]))
        cell.bias_hh.copy_(torch.tensor([0, 0, -0.1, -0.1, 0.2, 0.2]))
        first.in_proj.copy_(EYE)
        second.in_proj.copy_(torch.diag(torch.tensor([0.5, -1.0])))
        first.out_proj.copy_(2 * torch.cat([EYE, -EYE]))
        second.out_proj.copy_(1.5 * torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]))
    return model


@pytest.mark.parametrize("recurrent_state", WORKED)
def test_worked_example(recurrent_state: str) -> None:
    model = worked_model(recurrent_state)
    plain = plain_chain(model, WORKED_INPUTS)
    ours = our_chain(model, WORKED_INPUTS)
    for step, routing, expected in zip(plain, ours, WORKED[recurrent_state], strict=True):
        for name in ("r", "z", "n", "h", "logits"):
            torch.testing.assert_close(step[name][0].float(), torch.tensor(expected[name]), **DIGITS)
        found = {"h": routing.state, "logits": routing.logits, "probs": routing.probs}
        for name, value in found.items():
            torch.testing.assert_close(value[0], torch.tensor(expected[name]), **DIGITS)
        assert routing.expert_ids[0].tolist() == list(expected["weights"])
        torch.testing.assert_close(routing.weights[0], torch.tensor([*expected["weights"].values()]), **DIGITS)


def test_worked_example_losses_per_layer_and_pooled() -> None:
    routings = our_chain(worked_model("pass"), WORKED_INPUTS)
    weights = TokenWeights.build(None, None, (1, 1), torch.device("cpu"))
    per_layer = load_balance(routings, weights)
    torch.testing.assert_close(per_layer, torch.tensor([3.070580, 3.195416]), **DIGITS)
    torch.testing.assert_close(per_layer.mean(), torch.tensor(3.132998), **DIGITS)
    pooled = load_balance(routings, weights, pooled=True)
    torch.testing.assert_close(pooled, torch.tensor([2.499211]), **DIGITS)
    torch.testing.assert_close(pooled_balance([routing.logits for routing in routings], 2), pooled[0])


@pytest.mark.parametrize("reduction", ["mean", "pooled"])
def test_the_model_reduces_the_balance_loss_over_its_layers(reduction: str) -> None:
    model = chain_model(config={"aux_reduction": reduction, "balance_scope": "micro"}, init="uniform")
    output = model(tokens(2, 8), labels=tokens(2, 8), output_routing=True)
    logits = [routing.logits for routing in output.routing]
    expected = pooled_balance(logits, 2)
    if reduction == "mean":
        expected = torch.stack([pooled_balance([layer], 2) for layer in logits]).mean()
    torch.testing.assert_close(output.aux_losses["load_balance"], expected)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.01 * expected)


@PROPERTY
@given(
    cell=st.sampled_from(list(GATES)),
    size=st.integers(1, 12),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 99),
)
def test_cells_are_those_of_torch_and_follow_their_formulas(cell: str, size: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    reference = TORCH_CELLS[cell](size, size)
    core = RecurrentCore(RecurrentOptions(size=size, cell=cell), None)
    core.cell.load_state_dict(reference.state_dict())
    inputs, before, memory = scale * torch.randn(20, size), torch.randn(20, size).tanh(), torch.randn(20, size)
    pair = cell == "lstm"
    state, carried = core(inputs, torch.eye(size), torch.cat([before, memory], -1) if pair else before)
    expected = torch.cat(reference(inputs, (before, memory)), -1) if pair else reference(inputs, before)
    torch.testing.assert_close(carried, expected, rtol=0, atol=1e-6)
    arguments = (before.double(), memory.double()) if pair else (before.double(),)
    plain = getattr(plain_rmoe, cell)(cell_weights(core), inputs.double(), *arguments)
    torch.testing.assert_close(state.double(), plain["h"], rtol=0, atol=1e-6)
    if pair:
        torch.testing.assert_close(carried[:, size:].double(), plain["memory"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", [SPARSE, ["dense", "sparse", "dense", "dense", "sparse", "sparse", "dense"]])
@pytest.mark.parametrize("name", CHAINS)
def test_every_router_of_a_model_follows_the_formulas(name: str, layers: list[str]) -> None:
    """Dense layers, wherever they stand, leave the state alone, and the first router begins with zeros."""
    model = chain_model(layers, init="uniform", **CHAINS[name])
    inputs, output = recorded_inputs(model, tokens(2, 9))
    assert [routing is None for routing in output.routing] == [layer == "dense" for layer in layers]
    for routing, expected in zip(sparse(output.routing), plain_chain(model, inputs), strict=True):
        logits = expected["logits"].float()
        torch.testing.assert_close(routing.logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(routing.state[:, :6], expected["h"].float(), rtol=1e-5, atol=1e-5)
        probs, experts, weights = top_k(logits, 2)
        assert torch.equal(routing.expert_ids, experts)
        torch.testing.assert_close(routing.probs, probs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(routing.weights, weights, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(routing.weights.sum(-1), torch.ones(18))


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_of_a_chain_of_routers(name: str) -> None:
    model = chain_model(init="uniform", **CHAINS[name])
    probes = [random(20, 8, seed=10 + layer) for layer in range(4)]
    results = []
    for chain in (our_chain, plain_chain):
        inputs = [random(20, 32, seed=layer).requires_grad_() for layer in range(4)]
        routers = chain(model, inputs)
        logits = [router.logits if chain is our_chain else router["logits"] for router in routers]
        sum((value * probe).sum() for value, probe in zip(logits, probes, strict=True)).backward()
        parameters = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        results.append({**parameters, **{f"input {layer}": part.grad for layer, part in enumerate(inputs)}})
        model.zero_grad()
    ours, plain = results
    assert ours.keys() == plain.keys() and any(".cell." in key for key in ours)
    for key, value in plain.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize("cell", GATES)
def test_without_a_state_every_router_begins_with_zeros(cell: str) -> None:
    model = chain_model(init="uniform", cell=cell, recurrent_state="none")
    inputs = [random(20, 32, seed=layer) for layer in range(4)]
    core = model.model.shared_scorers["recurrent"]
    passing = chain_model(init="uniform", cell=cell)
    chains = zip(model.moe_blocks(), our_chain(model, inputs), our_chain(passing, inputs), strict=True)
    for layer, (block, routing, passed) in enumerate(chains):
        alone = block.route(inputs[layer], RoutingContext(layer, shared=core))
        assert torch.equal(routing.logits, alone.logits)
        assert torch.equal(routing.logits, passed.logits) == (layer == 0)


@pytest.mark.parametrize("cell", GATES)
def test_detach_has_the_forward_of_pass_and_no_recurrent_gradient(cell: str) -> None:
    inputs = [random(20, 32, seed=layer) for layer in range(4)]
    last, below = {}, {}
    for state in ("pass", "detach"):
        model = chain_model(init="uniform", cell=cell, recurrent_state=state)
        last[state] = our_chain(model, inputs)[-1].logits
        (last[state] * random(20, 8, seed=9)).sum().backward()
        gradients = [block.gate.in_proj.grad for block in model.moe_blocks()]
        assert gradients[-1].any()
        below[state] = gradients[:-1]
    assert torch.equal(last["pass"], last["detach"])
    assert all(gradient.abs().max() > 1e-5 for gradient in below["pass"])
    assert all(gradient is None or not gradient.any() for gradient in below["detach"])


@pytest.mark.parametrize("projector", ["per_layer", "shared"])
@pytest.mark.parametrize(("cell", "num_gates"), [("gru", 3), ("rnn", 1), ("lstm", 4)])
def test_one_cell_and_the_number_of_parameters(cell: str, num_gates: int, projector: str) -> None:
    config = tiny_config(
        {"method": "rmoe", "scorer": {"size": 20, "cell": cell, "projector": projector}},
        num_hidden_layers=7,
        mlp_layer_types=["dense", *["sparse"] * 5, "dense"],
    )
    model = AutoModelForCausalLM.from_config(config)
    sizes = {key: value.numel() for key, value in model.named_parameters() if "gate." in key or "shared_scorers" in key}
    assert len([key for key in sizes if "cell" in key]) == 4
    num_projections = 5 if projector == "per_layer" else 1
    p, hidden_size, num_experts = 20, 32, 8
    expected = num_projections * p * hidden_size + 5 * p * num_experts + num_gates * (2 * p * p + 2 * p)
    assert sum(sizes.values()) == expected


def test_the_state_is_a_tokens_own() -> None:
    model = chain_model(init="uniform")
    inputs = [random(20, 32, seed=layer) for layer in range(4)]
    states = [routing.state for routing in our_chain(model, inputs)]
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    reordered = [routing.state for routing in our_chain(model, [hidden[order] for hidden in inputs])]
    for hidden in inputs:
        hidden[:7] = random(7, 32, seed=11)
    changed = [routing.state for routing in our_chain(model, inputs)]
    for state, permuted, other in zip(states, reordered, changed, strict=True):
        torch.testing.assert_close(permuted, state[order], rtol=0, atol=1e-6)
        torch.testing.assert_close(other[7:], state[7:], rtol=0, atol=1e-6)
        assert (other[:7] - state[:7]).abs().min() > 0


def test_an_earlier_token_acts_through_the_hidden_states_only() -> None:
    """After a change of token 2, later tokens have other states, and those follow from their own inputs."""
    model = chain_model(init="uniform")
    content = tokens(2, 9)
    other = content.clone()
    other[0, 2] = content[0, 2] % 96 + 1
    before = model(content, output_routing=True).routing
    inputs, output = recorded_inputs(model, other)
    for first, second, plain in zip(before, output.routing, plain_chain(model, inputs), strict=True):
        same, changed = first.state.view(2, 9, 6), second.state.view(2, 9, 6)
        torch.testing.assert_close(same[0, :2], changed[0, :2], rtol=0, atol=1e-6)
        torch.testing.assert_close(same[1], changed[1], rtol=0, atol=1e-6)
        torch.testing.assert_close(second.state, plain["h"].float(), rtol=1e-5, atol=1e-5)
    assert (same[0, 2:] - changed[0, 2:]).abs().amax(-1).min() > 1e-5


def test_cached_steps_give_the_states_of_the_full_forward_and_the_cache_holds_none() -> None:
    model = chain_model(init="uniform")
    content = tokens(2, 9)
    full = [routing.state.view(2, 9, 6) for routing in model(content, output_routing=True).routing]
    cache, start = None, 0
    for end in (5, 6, 9):
        step = model(content[:, start:end], past_key_values=cache, use_cache=True, output_routing=True)
        for routing, state in zip(step.routing, full, strict=True):
            torch.testing.assert_close(routing.state.view(2, -1, 6), state[:, start:end], rtol=1e-5, atol=1e-5)
        cache, start = step.past_key_values, end
    held = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    assert [value.shape for value in held] == [(2, 2, 9, 8)] * 8


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_the_recurrent_gradient(use_reentrant: bool) -> None:
    """The loss reads the last router alone, so the state must come out of, and go into, checkpointed layers."""
    gradients = []
    for checkpointing in (False, True):
        model = chain_model(init="uniform").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        last = model(tokens(2, 8), output_routing=True).routing[-1]
        (last.logits * random(16, 8)).sum().backward()
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    plain, recomputed = gradients
    routers = [key for key in plain if "gate.in_proj" in key or ".cell." in key]
    assert len(routers) == 4 + 4
    for key in routers:
        assert plain[key].any(), key
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-6, atol=1e-7, msg=key)


def test_dense_layers_and_the_end_of_the_model_do_not_read_the_state() -> None:
    model = chain_model(["sparse", "dense"], init="uniform")
    dense = model.model.layers[1]
    hidden = random(2, 5, 32)
    options = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(5)[None])}
    plain, read = (dense(hidden, state, **options) for state in (None, random(10, 6)))
    assert len(plain) == len(read) == 1 and torch.equal(plain[0], read[0])


def test_the_state_passes_layers_with_another_scorer() -> None:
    model = chain_model(config={"layer_routing": {2: {"scorer": "linear"}}}, init="uniform")
    inputs, output = recorded_inputs(model, tokens(2, 9))
    assert torch.equal(output.routing[2].state, output.routing[1].state)
    kept = [0, 1, 3]
    expected = plain_chain(model, [inputs[layer] for layer in kept], kept)
    for layer, plain in zip(kept, expected, strict=True):
        torch.testing.assert_close(output.routing[layer].logits, plain["logits"].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", GATES)
def test_states_stay_between_minus_one_and_one(cell: str) -> None:
    model = chain_model(init="uniform", cell=cell)
    for scale in (0.0, 1.0, 30.0, 1e4):
        for routing in our_chain(model, [scale * random(50, 32, seed=layer) for layer in range(4)]):
            state = routing.state[:, :6].abs()
            # tanh rounds to 1 for large inputs.
            assert (state < 1).all() if scale <= 1 else (state <= 1).all()


@pytest.mark.parametrize("cell", GATES)
def test_a_cell_of_zeros_routes_uniformly(cell: str) -> None:
    model = chain_model(cell=cell)
    with torch.no_grad():
        for parameter in model.model.shared_scorers.parameters():
            parameter.zero_()
    for routing in our_chain(model, [random(20, 32, seed=layer) for layer in range(4)]):
        assert not routing.state.any()
        assert torch.equal(routing.probs, torch.full((20, 8), 1 / 8))


@pytest.mark.parametrize("init", ["normal", "uniform"])
@pytest.mark.parametrize("projector", ["per_layer", "shared"])
@pytest.mark.parametrize("origin", ["built", "filled from the meta device"])
def test_initialisation(origin: str, projector: str, init: str, tmp_path) -> None:
    """Every tensor is drawn from its distribution, also where a checkpoint lacks it and the model begins on meta."""
    model = chain_model(size=64, init=init, projector=projector)
    if origin != "built":
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        rest = {key: value for key, value in weights.items() if "gate." not in key and "shared_scorers" not in key}
        assert len(rest) < len(weights)
        save_file(rest, tmp_path / "model.safetensors")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    cell = model.model.shared_scorers["recurrent"].cell
    biases = torch.cat([cell.bias_ih, cell.bias_hh])
    if init == "normal":
        assert not biases.any()
        deviations = {cell.weight_ih: 0.2, cell.weight_hh: 0.2}
        projection, head = 0.2, 0.2
    else:
        bound = 64**-0.5
        for parameter in cell.parameters():
            assert 0.95 * bound < parameter.max() <= bound and -bound <= parameter.min() < -0.95 * bound
        deviations = dict.fromkeys(cell.parameters(), bound / math.sqrt(3))
        projection, head = 32**-0.5, 64**-0.5
    blocks = model.moe_blocks()
    projections = [model.model.shared_scorers["recurrent"]] if projector == "shared" else [b.gate for b in blocks]
    deviations |= {module.in_proj: projection for module in projections}
    deviations |= {block.gate.out_proj: head for block in blocks}
    for parameter, deviation in deviations.items():
        assert parameter.isfinite().all()
        assert parameter.std().item() == pytest.approx(deviation, rel=0.15)


def test_initialisation_follows_the_seed() -> None:
    def routers(seed: int) -> Tensor:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(rmoe()))
        drawn = [value.flatten() for key, value in model.named_parameters() if "gate." in key or "cell.weight" in key]
        return torch.cat(drawn).detach()

    assert torch.equal(routers(1), routers(1))
    assert (routers(1) != routers(2)).all()


@pytest.mark.parametrize("hidden_size", [352, 1280])
def test_first_logits_are_almost_flat_by_default_and_as_wide_as_those_of_a_linear_router_with_uniform(
    hidden_size: int,
) -> None:
    found = {}
    for init in ("normal", "uniform"):
        sizes = {"hidden_size": hidden_size, "moe_intermediate_size": 1, "num_experts": 16, "initializer_range": 0.02}
        model = chain_model(["sparse"], config=sizes, size=128, init=init)
        with torch.no_grad():
            (routing,) = our_chain(model, [random(500, hidden_size)])
        found[init] = routing.logits.std().item()
    # Small inputs make the update gate 1/2 and the candidate linear: three matrices in a row, and a half.
    assert found["normal"] == pytest.approx(0.5 * 0.02**3 * 128 * math.sqrt(hidden_size), rel=0.15)
    assert 0.2 < found["uniform"] < 0.3


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        ({"size": 0}, "size must be at least 1"),
        ({"size": 8.0}, "'size'"),
        ({"cell": "gru2"}, "'cell'"),
        ({"recurrent_state": "stop"}, "'recurrent_state'"),
        ({"projector": "none"}, "'projector'"),
        ({"logit_residual_alpha": float("nan")}, "must be a finite number"),
        ({"logit_residual_alpha": "0.5"}, "'logit_residual_alpha'"),
        ({"init": "orthogonal"}, "'init'"),
        ({"hidden_size": 64}, "key in routing.scorer"),
    ],
)
def test_refused_options(scorer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynMoeConfig(routing={"method": "rmoe", "scorer": scorer})


def test_layers_that_would_share_a_cell_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="share one cell"):
        tiny_config(rmoe(), layer_routing={2: {"scorer": {"size": 7}}})
