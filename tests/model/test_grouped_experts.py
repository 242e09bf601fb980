"""The way of the engine `ragged` on a GPU, on a CPU: what grouped products leave in the rows of unused slots is
undefined, and nothing waits for the host."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynmoe_hf.model import dispatch
from dynmoe_hf.model.dispatch import grouped_experts
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
from tests.tiny import NEEDS_COMPILED_GROUPED_MM

E = 5
SHARES = {"nobody": 0.0, "some": 0.4, "everybody": 1.0}


class TailOfNan(torch.autograd.Function):
    """Rows from `end` on become NaN, and so do their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: Tensor) -> Tensor:
        ctx.save_for_backward(end)
        return rows.masked_fill(torch.arange(rows.shape[0])[:, None] >= end, torch.nan)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return TailOfNan.apply(grad, *ctx.saved_tensors), None


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a GPU, whose grouped products never write those rows."""
    product = dispatch.grouped_linear

    def poisoned(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        used = TailOfNan.apply(rows, offsets[-1])
        return TailOfNan.apply(product(used, weight, offsets), offsets[-1])

    monkeypatch.setattr(dispatch, "grouped_linear", poisoned)


def grouped(call: Call) -> dict[str, Tensor]:
    output = grouped_experts(call.experts, call.hidden_states, call.expert_ids, call.weights)
    return differentiate(output, call.probe(), call.leaves())


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 9), num_experts=st.integers(1, 5), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_call(layout: str, num_tokens: int, num_experts: int, share: float, seed: int) -> None:
    call = make_call(make_experts(layout, num_experts), random_ids(num_tokens, num_experts, share, seed))
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch)
        found = grouped(call)
    assert_equal(found, exact(call))


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_undefined_rows_reach_nothing(layout: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    call = make_call(make_experts(layout, E), random_ids(9, E, share))
    found = grouped(call)
    assert all(value.isfinite().all() for value in found.values())
    assert_equal(found, exact(call))
    assert (found["weights"][call.expert_ids == E] == 0).all()


def test_activations_that_are_known_already() -> None:
    """Only calls without unused slots have them."""
    call = make_call(make_experts("low_rank", E), random_ids(9, E, 1.0))
    each = torch.einsum("td,erd->ter", call.hidden_states, call.experts.gate_down_proj)
    activations = each.gather(1, call.expert_ids[..., None].expand(-1, -1, each.shape[-1]))
    output = grouped_experts(call.experts, call.hidden_states, call.expert_ids, call.weights, activations)
    assert_equal(differentiate(output, call.probe(), call.leaves()), exact(call))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(layout: str) -> None:
    call = make_call(make_experts(layout, E), random_ids(40, E, 0.5))
    first, second = grouped(call), grouped(call)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


HOST_WAITS_FOR = (
    "nonzero",
    "_local_scalar_dense",
    "item",
    "bincount",
    "unique",
    "masked_select",
    "equal",
    "is_nonzero",
)


class NoWaiting(TorchDispatchMode):
    """Fails where a GPU would make the host wait for a number, or sort in an order that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not name.strip("_").startswith(HOST_WAITS_FOR) and name != "_local_scalar_dense", name
        masks = [arg for arg in args[1] if arg is not None] if name in ("index", "index_put") else []
        assert all(mask.dtype != torch.bool for mask in masks), f"{name} with a mask has a shape to wait for"
        self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_for_nothing(layout: str, share: float) -> None:
    call = make_call(make_experts(layout, E), random_ids(9, E, share))
    with NoWaiting() as mode:
        output = grouped_experts(call.experts, call.hidden_states, call.expert_ids, call.weights)
        forward = len(mode.seen)
        torch.autograd.backward(output, torch.ones_like(output))
    assert forward > 10 and len(mode.seen) > forward + 10
    assert {"sort", "masked_fill"} <= set(mode.seen)
    assert not {"index_add", "index_add_", "scatter_add", "scatter_add_"} & set(mode.seen), "in any order on a GPU"


@pytest.mark.parametrize("wait", [torch.nonzero, torch.Tensor.item, torch.unique, torch.bincount, lambda x: x[x > 0]])
def test_waiting_is_noticed(wait: Any) -> None:
    with pytest.raises(AssertionError), NoWaiting():
        wait(torch.ones(1, dtype=torch.int64))


@NEEDS_COMPILED_GROUPED_MM
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_as_one_graph(layout: str) -> None:
    torch.compiler.reset()
    first, second = (make_call(make_experts(layout, E), random_ids(9, E, 0.5, seed)) for seed in (0, 1))
    compiled = torch.compile(grouped_experts, fullgraph=True, backend="aot_eager")
    for call, stance in ((first, "default"), (second._replace(experts=first.experts), "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            output = compiled(call.experts, call.hidden_states, call.expert_ids, call.weights)
            found = differentiate(output, call.probe(), call.leaves())
        assert_equal(found, exact(call))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision(layout: str) -> None:
    call = make_call(make_experts(layout, E), random_ids(20, E, 0.5))
    with torch.autocast("cpu", torch.bfloat16):
        output = grouped_experts(call.experts, call.hidden_states, call.expert_ids, call.weights)
    assert output.dtype == torch.float32
    found = differentiate(output, call.probe(), call.leaves())
    assert all(value.dtype == torch.float32 for value in found.values())
    assert_equal(found, exact(call), tolerance=2e-2)
    with pytest.raises(AssertionError):
        assert_equal(found, exact(call), tolerance=1e-4)
