"""Our AoE block against the first official implementation (`tests/vectors/README.md`), and against the second one's
layout and weights, computed here from their definition."""

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dynmoe_hf import DynMoeConfig
from dynmoe_hf.convert import AOE_FIRST, AOE_SECOND, from_ours, to_ours
from dynmoe_hf.model import dispatch
from dynmoe_hf.model.losses import TokenWeights, load_balance
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock, build_experts
from dynmoe_hf.model.routing import Routing, RoutingContext
from tests.recorded import FOLDER
from tests.tiny import ENGINES

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def vectors() -> dict[str, Tensor]:
    return load_file(FOLDER / "aoe_v1_fp32.safetensors")


def our_block(weights: dict[str, Tensor], engine: str, **selector: Any) -> DynMoeBlock:
    """A block with these expert weights, whose shapes say the sizes."""
    num_experts, rank, hidden_size = weights["gate_down_proj"].shape
    config = DynMoeConfig(
        hidden_size=hidden_size,
        num_attention_heads=4,
        num_experts=num_experts,
        routing={
            "method": "aoe",
            "selector": {"k": 2, **selector},
            "experts": {"rank": rank, "intermediate_size": weights["up_proj"].shape[1]},
        },
        experts_implementation=engine,
    )
    block = DynMoeBlock(config, 0, build_experts).to(weights["up_proj"].dtype)
    block.experts.load_state_dict(weights)
    return block


def dense_weights(routing: Routing) -> Tensor:
    return torch.zeros_like(routing.logits).scatter(1, routing.expert_ids, routing.weights)


def expert_gradients(block: DynMoeBlock) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in block.experts.named_parameters()}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * value.abs().max().item(), msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_first_official_implementation(engine: str) -> None:
    recorded = vectors()
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    gradients = {key.removeprefix("grad."): value for key, value in recorded.items() if key.startswith("grad.")}
    block = our_block(to_ours(AOE_FIRST, state), engine)
    inputs = recorded["input"].clone().requires_grad_()
    output, routing = block(inputs, RoutingContext(0))

    torch.testing.assert_close(output, recorded["output"], **CLOSE)
    torch.testing.assert_close(routing.logits, recorded["act_norms"], **CLOSE)
    torch.testing.assert_close(routing.probs, recorded["full_softmax"], **CLOSE)
    assert torch.equal(routing.expert_ids, recorded["topk_index"])
    torch.testing.assert_close(routing.weights, recorded["topk_weight_renorm"], **CLOSE)
    balance = load_balance([routing], TokenWeights.build(None, None, (2, 7), torch.device("cpu")), scope="micro")
    torch.testing.assert_close(balance, recorded["balance_loss"], **CLOSE)

    ((output * recorded["upstream_grad"]).sum() + 0.01 * balance.sum()).backward()
    assert_same_gradients({"input": inputs.grad}, {"input": recorded["grad_input"]})
    assert_same_gradients(from_ours(AOE_FIRST, expert_gradients(block)), gradients)


def test_first_official_implementation_without_renormalisation() -> None:
    recorded = vectors()
    state = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    _, routing = our_block(to_ours(AOE_FIRST, state), "eager", norm_topk_prob=False)(
        recorded["input"], RoutingContext(0)
    )
    assert torch.equal(routing.expert_ids, recorded["topk_index"])
    torch.testing.assert_close(routing.weights, recorded["topk_weight_raw"], **CLOSE)


# What the second official implementation computes, in its own layout: 16 wide, 4 experts of rank 8 and width 128, 2 of
# them for each token, 6 positions of 2 sequences, position first.
SIZES = {"wg": (16, 4 * 8), "experts.mlp.wup": (4 * 128, 8), "experts.mlp.v1": (4 * 128, 16)}
SIZES["experts.mlp.w2"] = SIZES["experts.mlp.v1"]


def second_layout() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Weights under the official names, input and upstream gradient (S, B, D), in float64."""
    generator = torch.Generator().manual_seed(7)
    draw = {"generator": generator, "dtype": torch.float64}
    weights = {name: (0.3 if name == "wg" else 0.2) * torch.randn(size, **draw) for name, size in SIZES.items()}
    return weights, torch.randn(6, 2, 16, **draw), torch.randn(6, 2, 16, **draw)


def second_implementation(weights: dict[str, Tensor], inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (S, B, D), norms and scores (T, E), counts (E,): one token and one chosen expert at a time."""
    tokens = inputs.reshape(-1, 16)
    activations = (tokens @ weights["wg"]).view(-1, 4, 8)
    norms = (activations**2).sum(-1) ** 0.5
    scores = norms.exp() / norms.exp().sum(-1, keepdim=True)
    chosen = scores.argsort(-1, descending=True)[:, :2]
    rows = []
    for token, experts in enumerate(chosen.tolist()):
        row = torch.zeros(16, dtype=inputs.dtype)
        for expert in experts:
            block = slice(128 * expert, 128 * (expert + 1))
            gate = weights["experts.mlp.wup"][block] @ activations[token, expert]
            hidden = gate * torch.sigmoid(gate) * (weights["experts.mlp.v1"][block] @ tokens[token])
            row = row + scores[token, expert] * (hidden @ weights["experts.mlp.w2"][block])
        rows.append(row)
    return torch.stack(rows).view_as(inputs), norms, scores, chosen.flatten().bincount(minlength=4)


PRECISIONS = [*itertools.product(ENGINES, [torch.float32]), *itertools.product(dispatch.ENGINES, [torch.float64])]


@pytest.mark.parametrize(("engine", "dtype"), PRECISIONS)
def test_second_official_implementation(engine: str, dtype: torch.dtype) -> None:
    weights, inputs, upstream = second_layout()
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    leaf = inputs.clone().requires_grad_()
    expected, norms, scores, counts = second_implementation(leaves, leaf)
    (expected * upstream).sum().backward()

    block = our_block(to_ours(AOE_SECOND, weights, 4), engine, norm_topk_prob=False)
    block.to(dtype)
    ours = inputs.to(dtype).requires_grad_()
    output, routing = block(ours, RoutingContext(0))
    (output * upstream.to(dtype)).sum().backward()

    close = CLOSE if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(output, expected.to(dtype), **close)
    torch.testing.assert_close(routing.logits, norms.to(dtype), **close)
    torch.testing.assert_close(routing.probs, scores.float(), **CLOSE)
    assert torch.equal(routing.selected().sum(0).long(), counts)
    torch.testing.assert_close(dense_weights(routing).to(dtype), (scores * routing.selected()).to(dtype), **CLOSE)
    assert_same_gradients({"input": ours.grad.double()}, {"input": leaf.grad})
    gradients = {name: gradient.double() for name, gradient in from_ours(AOE_SECOND, expert_gradients(block)).items()}
    assert_same_gradients(gradients, {name: weight.grad for name, weight in leaves.items()})


def test_renormalisation_would_change_the_second_one() -> None:
    weights, inputs, _ = second_layout()
    expected = second_implementation(weights, inputs)[0]
    block = our_block(to_ours(AOE_SECOND, weights, 4), "eager")
    assert (block(inputs, RoutingContext(0))[0] - expected).abs().max() > 0.1


def test_layouts_convert_into_each_other() -> None:
    """From the first layout to the second and back, each time through ours, with equal outputs on the way."""
    recorded = vectors()
    first = {key.removeprefix("state."): value for key, value in recorded.items() if key.startswith("state.")}
    second = from_ours(AOE_SECOND, to_ours(AOE_FIRST, first))
    assert {name: tuple(value.shape) for name, value in second.items()} == {
        "wg": (32, 8 * 8),
        "experts.mlp.wup": (8 * 24, 8),
        "experts.mlp.v1": (8 * 24, 32),
        "experts.mlp.w2": (8 * 24, 32),
    }
    back = from_ours(AOE_FIRST, to_ours(AOE_SECOND, second, 8))
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], first[name]) for name in first)
    output, _ = our_block(to_ours(AOE_SECOND, second, 8), "eager")(recorded["input"], RoutingContext(0))
    torch.testing.assert_close(output, recorded["output"], **CLOSE)
