"""Low-rank experts: every engine is plain autograd on the definition, and nothing of the size of all activations is
kept for the backward pass (Lv et al. 2025, arXiv 2501.13074)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef

from dynmoe_hf.model import dispatch
from dynmoe_hf.model.compat import ExpertsInterface
from dynmoe_hf.model.modeling_dynmoe import DynMoeBlock
from dynmoe_hf.model.routing import RoutingContext
from tests.model.plain_aoe import balance, gradients, inputs_for, leaves_of, make_block, plain_block
from tests.tiny import ENGINES, NEEDS_COMPILED_GROUPED_MM

# Every name that transformers knows, among them engines that other machines have.
ENGINE_NAMES = sorted({*ENGINES, *ExpertsInterface().valid_keys()})
EXACT_ENGINES = tuple(dispatch.ENGINES)  # those that know float64
EXACT = {"rtol": 1e-10, "atol": 1e-10}
CONTEXT = RoutingContext(0)


def in_float64(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def assert_close_to_plain(block: DynMoeBlock, aux: bool, masked: bool, share: float, **close: float) -> None:
    """Output, scores and gradients against the definition in float64; `share` of the largest gradient may be off.

    With a mask that spares every token, the block takes the flat instead of the padded form of a call.
    """
    inputs = inputs_for(block, 20)
    mask = torch.ones(20, dtype=torch.bool) if masked else None
    output, routing = block(inputs, RoutingContext(0, mask))
    found = gradients(output[0], routing.logits, aux, leaves_of(block, inputs))

    plain = in_float64(leaves_of(block, inputs))
    expected_output, scores = plain_block(plain, plain["inputs"], block.spec["selector"]["norm_topk_prob"])
    expected = gradients(expected_output, scores, aux, plain)
    torch.testing.assert_close(output[0].double(), expected_output, **close)
    torch.testing.assert_close(routing.logits.double(), scores, **close)
    for name, value in expected.items():
        tolerance = {"rtol": 0, "atol": share * value.abs().max().item()}
        torch.testing.assert_close(found[name].double(), value, **tolerance, msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_every_engine_is_plain_autograd(engine: str, aux: bool, masked: bool) -> None:
    assert_close_to_plain(make_block(engine, torch.float32), aux, masked, share=1e-5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("engine", EXACT_ENGINES)
def test_plain_autograd_to_float64(engine: str, renormalise: bool, aux: bool, masked: bool) -> None:
    block = make_block(engine, routing={"selector": {"norm_topk_prob": renormalise}})
    assert_close_to_plain(block, aux, masked, share=1e-12, **EXACT)


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_sizes_that_no_grouped_product_takes(engine: str) -> None:
    block = make_block(engine, torch.float32, hidden_size=10, rank=5, width=11)
    assert_close_to_plain(block, aux=True, masked=True, share=1e-5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_a_linear_router_in_front_of_low_rank_experts(engine: str, masked: bool) -> None:
    """Configuration 3 of the paper."""
    block = make_block(engine, torch.float32, routing={"scorer": "linear"})
    assert_close_to_plain(block, aux=True, masked=masked, share=1e-5, rtol=1e-5, atol=1e-5)
    if engine in EXACT_ENGINES:
        block = make_block(engine, routing={"scorer": "linear"})
        output, routing = block(inputs_for(block, 20), CONTEXT)
        expected, _ = plain_block(dict(block.named_parameters()), inputs_for(block, 20), True)
        # Linear routers score in float32.
        torch.testing.assert_close(output[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", EXACT_ENGINES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_finite_differences(engine: str, masked: bool) -> None:
    block = make_block(engine, std=0.6, hidden_size=4, num_experts=3, rank=2, width=3)
    names = [name for name, _ in block.named_parameters()]
    context = RoutingContext(0, torch.ones(3, dtype=torch.bool) if masked else None)

    def run(inputs: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        output, routing = functional_call(block, dict(zip(names, weights, strict=True)), (inputs, context))
        return output, routing.logits

    assert gradcheck(run, (inputs_for(block, 3), *block.parameters()))


@NEEDS_COMPILED_GROUPED_MM
@pytest.mark.parametrize("masked", [False, True])
def test_one_graph_when_compiled(masked: bool) -> None:
    block = make_block("grouped_mm", torch.float32)
    torch.compiler.reset()
    context = RoutingContext(0, torch.arange(20) < 15) if masked else CONTEXT
    inputs = inputs_for(block, 20)
    results = []
    for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        output, routing = call(inputs, context)
        results.append([output, *gradients(output, routing.logits, True, leaves_of(block, inputs)).values()])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_the_activations_of_all_experts_are_not_kept_for_the_backward_pass(engine: str, masked: bool) -> None:
    block = make_block(engine, torch.float32, hidden_size=32, num_experts=16, rank=16)
    num_tokens = 64
    all_experts = num_tokens * 16 * 16
    assert all(weight.numel() < all_experts for weight in block.parameters())
    activations = []
    project = block.experts.project

    def spy(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        norms, projected = project(hidden_states)
        activations.append((projected.numel(), StorageWeakRef(projected.untyped_storage())))
        return norms, projected

    block.experts.project = spy
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    mask = torch.ones(num_tokens, dtype=torch.bool) if masked else None
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output, routing = block(inputs_for(block, num_tokens), RoutingContext(0, mask))
        loss = output.sum() + balance(routing.logits)
    ((numel, storage),) = activations
    assert numel == all_experts
    assert storage.expired(), "the graph, or whoever else, holds the activations of all experts"
    assert len(saved) > 5
    assert max(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in saved) < all_experts
    loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in block.parameters())


def mixed_precision(call: Callable[[], Any]) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return call()


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_mixed_precision(engine: str, aux: bool) -> None:
    """Products in bfloat16, norms in float32, and gradients in the dtype of the weights."""
    block = make_block(engine, torch.float32)
    inputs = inputs_for(block, 40)
    output, routing = mixed_precision(partial(block, inputs, CONTEXT))
    assert routing.logits.dtype == torch.float32
    found = gradients(output[0].float(), routing.logits, aux, leaves_of(block, inputs))

    plain = {name: leaf.detach().requires_grad_() for name, leaf in leaves_of(block, inputs).items()}
    expected_output, scores = mixed_precision(partial(plain_block, plain, plain["inputs"], True))
    expected = gradients(expected_output.float(), scores, aux, plain)
    assert torch.equal(routing.logits.topk(2).indices, scores.topk(2).indices), "compare the same choice"
    torch.testing.assert_close(routing.logits, scores, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        output[0].float(), expected_output.float(), rtol=0, atol=0.02 * output.abs().max().item()
    )
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        tolerance = {"rtol": 0, "atol": 0.02 * value.abs().max().item()}
        torch.testing.assert_close(found[name], value, **tolerance, msg=name)
