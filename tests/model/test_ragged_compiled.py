"""The engine `ragged` under compilers, export, mixed precision and gradient checkpointing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dynmoe_hf import DynMoeForCausalLM
from dynmoe_hf.model import dispatch, ragged
from dynmoe_hf.model.methods import METHODS
from tests.model.plain_experts import (
    LAYOUTS,
    Call,
    assert_equal,
    differentiate,
    exact,
    make_call,
    make_experts,
    random_ids,
)
from tests.tiny import tiny_model, tokens

RAGGED = tuple(dispatch.RAGGED)
E = 5


def one_layer(method: str, engine: str) -> DynMoeForCausalLM:
    return tiny_model(method, engine, num_hidden_layers=1, mlp_layer_types=["sparse"])


def step(model: DynMoeForCausalLM, content: Tensor) -> dict[str, Tensor]:
    """Logits, loss and gradients of one training step."""
    model.zero_grad()
    output = model(content, labels=content)
    output.loss.backward()
    gradients = {name.removeprefix("_orig_mod."): value.grad for name, value in model.named_parameters()}
    return {"logits": output.logits.detach(), "loss": output.loss.detach(), **gradients}


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("method", ["top_k", "top_p", "aoe"])
def test_a_training_step_is_one_graph_for_any_routing(method: str, engine: str) -> None:
    torch.compiler.reset()
    model = one_layer(method, engine).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    chosen = []
    for seed, stance in ((1, "default"), (2, "fail_on_recompile")):
        content = tokens(2, 8, seed=seed)
        expected = step(model, content)
        with torch.compiler.set_stance(stance):
            found = step(compiled, content)
        assert_equal(found, expected)
        chosen.append(model(content, output_routing=True).routing[0].expert_ids)
    assert not torch.equal(*chosen), "the second batch must be routed in another way"


@pytest.mark.parametrize(("method", "engine"), zip(("top_k", "top_p", "aoe"), RAGGED * 2, strict=False))
def test_inference_is_one_graph(method: str, engine: str) -> None:
    torch.compiler.reset()
    model = one_layer(method, engine)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens(2, 8)).logits, model(tokens(2, 8)).logits)


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export(layout: str, engine: str) -> None:
    experts = make_experts(layout, E, engine)
    calls = [make_call(experts, random_ids(num_tokens, E, 0.5)) for num_tokens in (7, 12)]
    size = torch.export.Dim("num_tokens", min=2)
    exported = torch.export.export(experts, tuple(calls[0][1:]), dynamic_shapes=[{0: size}] * 3)
    for call in calls:
        output = exported.module()(*call[1:])
        torch.testing.assert_close(output.double(), exact(call)["output"], rtol=1e-5, atol=1e-5)


def operator_arguments(layout: str, num_kept: int) -> tuple[Any, ...]:
    call = make_call(make_experts(layout, E), random_ids(7, E, 0.5))
    known = call.experts.project(call.hidden_states)[1] if layout == "low_rank" else None
    weights = dispatch.expert_weights(call.experts)[1]
    inputs = (call.hidden_states, call.expert_ids, call.weights, weights, known)
    return *inputs, layout, "silu", torch.float32, num_kept


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operators_are_what_compilers_are_told(layout: str, recompute: bool) -> None:
    used = int((random_ids(7, E, 0.5) < E).sum())
    arguments = operator_arguments(layout, 0 if recompute else used)
    torch.library.opcheck(ragged.experts_operator, arguments)
    hidden_states, expert_ids, routing_weights, weights, _, *options, _ = arguments
    kept = ragged.experts_operator(*arguments)[1].detach()
    inputs = [
        tensor.detach() for tensor in (torch.ones_like(hidden_states), hidden_states, expert_ids, routing_weights)
    ]
    weights = [weight.detach() for weight in weights]
    for needed in ([True] * len(weights), [False, *[True] * (len(weights) - 1)]):
        torch.library.opcheck(ragged._experts_backward, (*inputs, weights, kept, *options, needed))


def in_bfloat16(call: Call, backward_inside: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        output = call.experts(call.hidden_states, call.expert_ids, call.weights)
        if backward_inside:
            return differentiate(output, call.probe(), call.leaves())
    return differentiate(output, call.probe(), call.leaves())


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision(layout: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in bfloat16; everything that comes out is float32, and the same wherever the backward pass runs."""
    call = make_call(make_experts(layout, E, engine), random_ids(20, E, 0.5))
    dtypes = set()
    choose = ragged.fastest_products

    def spy(dtype: torch.dtype, *sizes: int) -> Any:
        dtypes.add(dtype)
        return choose(dtype, *sizes)

    monkeypatch.setattr(ragged, "fastest_products", spy)
    outside, inside = in_bfloat16(call, False), in_bfloat16(call, True)
    assert dtypes == {torch.bfloat16}
    for name, value in outside.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, inside[name])
    expected = exact(call)
    assert_equal(outside, expected, tolerance=3e-2)
    assert (outside["output"].double() - expected["output"]).abs().max() > 1e-4
    # Sums over tokens and experts are taken in float32.
    assert not any(torch.equal(outside[name], outside[name].bfloat16().float()) for name in ("output", "hidden_states"))


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_products_over_float32_weights_under_autocast(
    layout: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where products in float32 are faster, autocast does not make them bfloat16 again."""
    in_float32 = ragged.fastest_products(torch.float32, 1, 1)
    monkeypatch.setattr(ragged, "fastest_products", lambda *_: in_float32)
    call = make_call(make_experts(layout, E, engine), random_ids(20, E, 0.5))
    found, expected = in_bfloat16(call, True), exact(call)
    if engine == "ragged_recompute":
        assert_equal(found, expected)
    else:  # what is kept between the passes is bfloat16
        torch.testing.assert_close(found["output"].double(), expected["output"], rtol=1e-5, atol=1e-5)
        assert_equal(found, expected, tolerance=2e-2)


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method: str, engine: str) -> None:
    content = tokens(2, 8)
    expected = step(tiny_model(method, engine).train(), content)
    for reentrant in (False, True):
        model = tiny_model(method, engine).train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = step(model, content)
        assert torch.equal(found["loss"], expected["loss"])
        assert_equal(found, expected, tolerance=1e-6)
