"""What the engine `ragged` allocates, keeps and leaves out, and that nothing of it is uninitialised."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from dynmoe_hf.model import dispatch, ragged
from dynmoe_hf.model.products import Products, portable_products
from tests.model.plain_experts import LAYOUTS, Call, assert_equal, direct, dispatched, exact, make_call, make_experts

RAGGED = tuple(dispatch.RAGGED)
T, E, D, W, RANK = 64, 16, 24, 24, 16
USED = 2  # experts of a token, of E slots


def few_of_many_slots(layout: str, engine: str, num_unused_experts: int = 0) -> Call:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(T, E, generator=generator).argsort(-1)
    order = order.masked_fill(torch.rand(T, E, generator=generator).argsort(-1) >= USED, E)
    order = order.masked_fill(order < num_unused_experts, E)
    return make_call(make_experts(layout, E, engine, hidden_size=D, width=W, rank=RANK), order)


def allocations(call: Call) -> list[int]:
    """Bytes of every allocation of a forward and a backward pass."""
    direct(call)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        direct(call)
    sizes = [event.self_cpu_memory_usage for event in profiled.events()]
    return [size for size in sizes if size > 0]


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_larger_than_the_largest_weight(layout: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "BLOCK_ROWS", 0)  # a block is small, but these weights are, too
    call = few_of_many_slots(layout, engine)
    weights = [weight.nbytes for weight in call.experts.parameters()]
    of_all_experts = 4 * T * E * min(D, W)
    assert max(weights) < of_all_experts
    sizes = allocations(call)
    assert len(sizes) > 30, "the profiler looks into the operator"
    assert max(sizes) == max(weights)
    for size in set(weights):
        assert sizes.count(size) == weights.count(size), "one gradient for each weight and nothing else of its size"


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept_between_the_passes(layout: str, engine: str) -> None:
    call = few_of_many_slots(layout, engine)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        call.experts(call.hidden_states, call.expert_ids, call.weights)
    own = {call.hidden_states.data_ptr(), call.expert_ids.data_ptr(), call.weights.data_ptr()}
    own |= {weight.data_ptr() for weight in call.experts.parameters()}
    kept = [tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in own and tensor.numel()]
    num_columns = 2 * W + (RANK if layout == "low_rank" else 0)
    assert kept == ([(T * USED, num_columns)] if engine == "ragged" else [])


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_kept_without_gradients(layout: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = few_of_many_slots(layout, engine)
    rows = []

    def spy(*args: object) -> tuple[Tensor, Tensor]:
        output = ragged.experts_operator(*args)
        rows.append(output[1].shape[0])
        return output

    monkeypatch.setattr(dispatch, "experts_operator", spy)
    with torch.no_grad():
        output = call.experts(call.hidden_states, call.expert_ids, call.weights)
    torch.testing.assert_close(output, call.experts(call.hidden_states, call.expert_ids, call.weights))
    assert rows == [0, T * USED if engine == "ragged" else 0]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_unused", [0, 5, E])
@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fresh_memory_does_not_matter(
    layout: str, engine: str, num_unused: int, dtype: torch.dtype, poisoned: None
) -> None:
    """The gradient of an expert that no token uses is zero."""
    call = few_of_many_slots(layout, engine, num_unused)
    call = make_call(call.experts, call.expert_ids, dtype)
    found = direct(call)
    assert_equal(found, exact(call), tolerance=1e-5 if dtype == torch.float32 else 5e-2)
    for name, _ in call.experts.named_parameters():
        assert (found[name][:num_unused] == 0).all()


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_frozen_weights_cost_nothing(layout: str, engine: str, ranked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every set of weights that are not frozen: their gradients are right, and there is no product for others."""
    if ranked and layout == "swiglu":
        pytest.skip("only low-rank experts can be ranked by themselves")
    portable, products = portable_products(torch.float32), []

    def grad_by_rows(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        products.append((a.shape[0], b.shape[1]))
        return portable.grad_by_rows(a, b, out)

    chosen = Products(torch.float32, portable.rows_by_weight, portable.grad_by_weight, grad_by_rows)
    monkeypatch.setattr(ragged, "fastest_products", lambda *_: chosen)
    names = [name for name, _ in few_of_many_slots(layout, engine).experts.named_parameters()]
    for trained in ([], *([name] for name in names), names[1:], names):
        call = few_of_many_slots(layout, engine, num_unused_experts=3)
        for name, weight in call.experts.named_parameters():
            weight.requires_grad_(name in trained)
        products.clear()
        assert_equal(dispatched(call, ranked), exact(call))
        shapes = [tuple(weight.shape[1:]) for weight in call.experts.parameters() if weight.requires_grad]
        assert sorted(products) == sorted(shapes * (E - 3))
