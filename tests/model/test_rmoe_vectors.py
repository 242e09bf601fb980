"""Our RMoE models against tensors recorded from the released code (`tests/vectors/README.md`), and for what was not
recorded against `plain_rmoe.py`, which must itself give the recorded tensors."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dynmoe_hf import DynMoeConfig, DynMoeForCausalLM
from dynmoe_hf.convert import FORMATS, to_ours
from dynmoe_hf.model.routing import RoutingContext
from dynmoe_hf.model.scorers import RecurrentCore, RecurrentOptions
from tests.model.plain_rmoe import Tensors, mlp, padding_mask, pooled_balance, released_model, swiglu, under
from tests.recorded import CLOSE, Vectors, compare_prefill_and_one_cached_step, vectors

RECORDED = ("rmoe_gru", "rmoe_gru_shared")
# Not recorded: the weights of a recorded model, used in another way.
COMPUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("rmoe_gru", {"moe_router_type": "rnn"}),
    "rnn, other shares": ("rmoe_gru_shared", {"moe_router_type": "rnn", "moe_weight": 0.9, "share_weight": 0.3}),
    "linear": ("rmoe_gru", {"moe_router_type": "linear"}),
    "linear, shared": ("rmoe_gru_shared", {"moe_router_type": "linear"}),
    "first dense": ("rmoe_gru", {"moe_num_layers": 2}),
    "first two dense": ("rmoe_gru", {"moe_num_layers": 1}),
    "three experts": ("rmoe_gru", {"num_experts_per_tok": 3}),
}
CASES = (*RECORDED, *COMPUTED)
GATES = {"gru": "rzn", "rnn": "n", "linear": ""}


def our_state_dict(official: Tensors) -> Tensors:
    return to_ours(FORMATS["rmoe"].rules, official)


def our_model(case: Vectors, engine: str = "eager") -> DynMoeForCausalLM:
    arguments, notes = FORMATS["rmoe"].read_config(case.official)
    assert not notes
    # Eager attention, as recorded: only there does the gradient of a padding row follow all keys alike.
    model = AutoModelForCausalLM.from_config(
        DynMoeConfig(**arguments), experts_implementation=engine, attn_implementation="eager"
    )
    model.load_state_dict(our_state_dict(case.under("weights.")))
    return model.eval()


def other_weights(weights: Tensors, official: dict[str, Any]) -> Tensors:
    """What another configuration needs, made of the recorded weights."""
    router, start = official["moe_router_type"], "model.layers"
    kept = {name: value for name, value in weights.items() if "rnn_router" not in name or name[-1] in GATES[router]}
    num_layers = official["num_hidden_layers"]
    num_dense = num_layers - official["moe_num_layers"]
    for layer in range(num_layers):
        block = f"{start}.{layer}.block_sparse_moe"
        if layer < num_dense:
            for ours, theirs in {"gate": "w1", "up": "w3", "down": "w2"}.items():
                kept[f"{start}.{layer}.mlp.{ours}_proj.weight"] = weights[f"{block}.experts.0.{theirs}.weight"]
            kept = {name: value for name, value in kept.items() if not name.startswith(block)}
        elif router == "linear":
            kept[f"{block}.gate.weight"] = kept.pop(f"{block}.weight2") @ kept.pop(f"{block}.weight1")
    return kept


@cache
def computed(name: str) -> Vectors:
    """A case as `plain_rmoe.py` computes it: inputs, weights, activations, outputs, and gradients of all weights."""
    base, changes = COMPUTED.get(name, (name, {}))
    recorded = vectors(base)
    case = copy.copy(recorded)
    case.clear()
    case.official = recorded.official | changes
    weights = other_weights(recorded.under("weights."), case.official)
    leaves = {key: value.clone().requires_grad_() for key, value in weights.items()}
    record = released_model(leaves, case.official, *inputs_of(recorded))
    record["out.loss"].backward()
    case.update({key: value for key, value in recorded.items() if key.startswith("in.")})
    case.update({key: value.detach() for key, value in record.items()})
    case.update({f"weights.{key}": value for key, value in weights.items()})
    case.update({f"grad.{key}": leaf.grad for key, leaf in leaves.items()})
    return case


def inputs_of(case: Vectors) -> list[Tensor]:
    return [case[f"in.{name}"] for name in ("input_ids", "attention_mask", "labels")]


def case_of(name: str) -> Vectors:
    return vectors(name) if name in RECORDED else computed(name)


def moe_layers(case: Vectors) -> range:
    num_layers = case.official["num_hidden_layers"]
    return range(num_layers - case.official["moe_num_layers"], num_layers)


@pytest.mark.parametrize("name", RECORDED)
def test_the_plain_computation_gives_the_recorded_tensors(name: str) -> None:
    recorded, ours = vectors(name), computed(name)
    not_computed = {key for key in recorded if key not in ours}
    assert not_computed == {
        "act.layers.1.router_state_in",
        "act.layers.2.router_state_in",
        "out.prefill6_logits",
        "out.step7_cached_logits",
    }
    for key in recorded.keys() - not_computed:
        scale = recorded[key].abs().max().item() if key.startswith("grad.") else 1.0
        torch.testing.assert_close(ours[key], recorded[key], rtol=1e-5, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_state_logits_and_choice_in_every_layer(name: str) -> None:
    case = case_of(name)
    output = our_model(case)(**case.inputs, attention_mask=case["in.attention_mask"], output_routing=True)
    real = case.real.flatten()
    for layer, routing in enumerate(output.routing):
        if layer not in moe_layers(case):
            assert routing is None
            continue
        recorded = case.under(f"act.layers.{layer}.")
        assert torch.equal(routing.expert_ids[real], recorded["topk_indices"][real])
        torch.testing.assert_close(routing.logits[real], recorded["router_logits"][real], **CLOSE)
        torch.testing.assert_close(routing.weights[real], recorded["topk_weights"][real], **CLOSE)
        if case.official["moe_router_type"] == "linear":
            assert routing.state is None
        else:
            torch.testing.assert_close(routing.state[real], recorded["router_state"][real], **CLOSE)
        if "router_state_in" in recorded:
            before = output.routing[layer - 1].state
            torch.testing.assert_close(before[real], recorded["router_state_in"][real], **CLOSE)


@pytest.mark.parametrize(("name", "engine"), [*((name, "eager") for name in CASES), ("rmoe_gru_shared", "ragged")])
def test_logits_and_hidden_states(name: str, engine: str) -> None:
    case = case_of(name)
    model = our_model(case, engine)
    output = model(**case.inputs, attention_mask=case["in.attention_mask"], output_hidden_states=True)
    real = case.real
    torch.testing.assert_close(output.logits[real], case["out.logits"][real], **CLOSE)
    assert len(output.hidden_states) == case.official["num_hidden_layers"] + 1
    for number, hidden_states in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden_states[real], case[f"out.hidden_states.{number}"][real], **CLOSE)


@pytest.mark.parametrize("name", RECORDED)
def test_every_block_alone(name: str) -> None:
    """With the recorded state of the layer below; the recorded output is the routed part and its bias."""
    case = case_of(name)
    model = our_model(case)
    core = model.model.shared_scorers["recurrent"]
    for layer, block in enumerate(model.moe_blocks()):
        recorded = case.under(f"act.layers.{layer}.")
        context = RoutingContext(layer, state=recorded.get("router_state_in"), shared=core)
        output, routing = block(recorded["ffn_input"], context)
        expected = recorded["moe_output"]
        if case.official["add_moe_share_expert"]:
            weights = mlp(case.under(f"weights.model.layers.{layer}."), "mlp_share")
            expected = 0.5 * expected + 0.5 * swiglu(recorded["ffn_input"], *weights)
        torch.testing.assert_close(routing.state, recorded["router_state"], **CLOSE)
        torch.testing.assert_close(output, expected, **CLOSE)


@pytest.mark.parametrize(("name", "engine"), [*((name, "eager") for name in CASES), ("rmoe_gru_shared", "ragged")])
def test_whole_loss_and_its_gradients(name: str, engine: str) -> None:
    """The released loss counts padding, and one label is predicted from it, so here padding is routed as there."""
    case = case_of(name)
    model = our_model(case, engine)
    output = model(**case.inputs, attention_mask=padding_mask(case["in.attention_mask"]), labels=case["in.labels"])
    torch.testing.assert_close(output.logits, case["out.logits"], **CLOSE)
    torch.testing.assert_close(output.lm_loss[None], case["out.ce_loss"], **CLOSE)
    torch.testing.assert_close(output.aux_losses["load_balance"][None], case["out.aux_loss"], **CLOSE)
    torch.testing.assert_close(output.loss[None], case["out.loss"], **CLOSE)
    output.loss.backward()
    expected = our_state_dict(computed(name).under("grad."))
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, value in expected.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", RECORDED)
def test_pooled_loss_over_real_tokens(name: str) -> None:
    """The released formula, without the padding that it counts."""
    case = case_of(name)
    output = our_model(case)(**case.inputs, attention_mask=case["in.attention_mask"], labels=case["in.labels"])
    real = case.real.flatten()
    logits = [case[f"act.layers.{layer}.router_logits"][real] for layer in moe_layers(case)]
    expected = pooled_balance(logits, case.official["num_experts_per_tok"])
    assert (expected - case["out.aux_loss"]).abs() > 1e-3
    torch.testing.assert_close(output.aux_losses["load_balance"], expected, **CLOSE)


@pytest.mark.parametrize("name", RECORDED)
def test_prefill_and_one_cached_step(name: str) -> None:
    case = case_of(name)
    compare_prefill_and_one_cached_step(our_model(case), case)


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_the_cells_alone(kind: str) -> None:
    recorded = vectors("rmoe_cells")
    core = RecurrentCore(RecurrentOptions(size=6, cell=kind), None)
    official = {f"model.rnn_router.{name}": value for name, value in recorded.under(f"{kind}.weights.").items()}
    core.load_state_dict(under(our_state_dict(official), "model.shared_scorers.recurrent."))
    for carried, expected in ((recorded["in.h"], "out"), (None, "out_no_state")):
        state, carried_on = core(recorded["in.x"], torch.eye(6), carried)
        torch.testing.assert_close(state, recorded[f"{kind}.{expected}"], rtol=0, atol=1e-6)
        assert carried_on is state


@pytest.mark.parametrize("name", RECORDED)
def test_bfloat16_stays_close_to_the_released_bfloat16(name: str) -> None:
    """The released router works in bfloat16 but for its softmax; ours in float32, from the same weights."""
    case = case_of(name)
    weights = {key: value.bfloat16() for key, value in case.under("weights.").items()}
    released = released_model(weights, case.official, *inputs_of(case))
    assert released["out.logits"].dtype == torch.bfloat16
    model = our_model(case).to(torch.bfloat16)
    output = model(**case.inputs, attention_mask=case["in.attention_mask"], output_routing=True)
    real = case.real
    torch.testing.assert_close(output.logits[real], released["out.logits"][real], rtol=0, atol=2e-2)
    for layer, routing in enumerate(output.routing):
        theirs = released[f"act.layers.{layer}.topk_indices"][real.flatten()].sort(-1).values
        ours = routing.expert_ids[real.flatten()].sort(-1).values
        assert (ours != theirs).any(-1).sum() <= 1
