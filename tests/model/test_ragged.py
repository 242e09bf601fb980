"""The operator behind the engine `ragged`: equal to the definition of its experts for every call, and as precise."""

from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dynmoe_hf.model import dispatch, products, ragged
from dynmoe_hf.model.products import Products
from tests.model.plain_experts import (
    LAYOUTS,
    Call,
    assert_equal,
    differentiate,
    direct,
    dispatched,
    errors,
    exact,
    make_call,
    make_experts,
    one_module_per_expert,
    random_ids,
    strided,
)

OWN_ENGINES = tuple(dispatch.ENGINES)
RAGGED = tuple(dispatch.RAGGED)
# How the experts are called: with the slots as they are, through a block, or by a block that ranked them.
CALLS = [("swiglu", "direct"), ("swiglu", "block"), *(("low_rank", form) for form in ("direct", "block", "ranked"))]


def run(call: Call, form: str) -> dict[str, Tensor]:
    return direct(call) if form == "direct" else dispatched(call, ranked=form == "ranked")


@st.composite
def slots(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Ids (T, K) and E: any order, any of them unused, unused ones anywhere."""
    num_tokens, num_experts = draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 5]))
    num_slots = draw(st.integers(1, num_experts + 1))
    ids = torch.full((num_tokens, num_slots), num_experts)
    for row in ids:
        order = draw(st.permutations(range(num_experts)))[:num_slots]
        row[: len(order)] = torch.tensor(order)
        row[torch.tensor(draw(st.lists(st.booleans(), min_size=num_slots, max_size=num_slots)))] = num_experts
        row.copy_(row.roll(draw(st.integers(0, num_slots - 1))))
    return ids, num_experts


@pytest.mark.parametrize(("layout", "form"), CALLS)
@pytest.mark.parametrize("engine", OWN_ENGINES)
@settings(max_examples=25, deadline=None)
@given(ids=slots(), contiguous=st.booleans(), block_rows=st.sampled_from([0, 3, 128]))
def test_any_call(
    engine: str, layout: str, form: str, ids: tuple[Tensor, int], contiguous: bool, block_rows: int
) -> None:
    """Experts alone in their blocks, some together, and all in one."""
    call = make_call(make_experts(layout, ids[1], engine), ids[0])
    call = call if contiguous else strided(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragged, "BLOCK_ROWS", block_rows)
        assert_equal(run(call, form), exact(call))


NUM_EXPERTS = 5
ANY = random_ids(7, NUM_EXPERTS, 0.4)
ROUTINGS = {
    "some experts without tokens": ANY.masked_fill((ANY == 0) | (ANY == 3), NUM_EXPERTS),
    "some tokens without experts": ANY.index_fill(0, torch.tensor([0, 3, 6]), NUM_EXPERTS),
    "one expert takes all": torch.full((7, NUM_EXPERTS), NUM_EXPERTS).index_fill(1, torch.tensor([2]), 4),
    "every expert for every token": random_ids(7, NUM_EXPERTS, 1.0),
    "nothing is used": torch.full((7, NUM_EXPERTS), NUM_EXPERTS),
    "no tokens": ANY[:0],
}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("ids", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize(("layout", "form"), CALLS)
@pytest.mark.parametrize("engine", OWN_ENGINES)
def test_corners(engine: str, layout: str, form: str, ids: Tensor, contiguous: bool) -> None:
    call = make_call(make_experts(layout, NUM_EXPERTS, engine), ids)
    call = call if contiguous else strided(call)
    if not contiguous and ids.numel():
        assert not any(tensor.is_contiguous() for tensor in (*call[1:], *call.experts.parameters()))
    assert_equal(run(call, form), exact(call))


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("ids", [ROUTINGS["nothing is used"], ROUTINGS["no tokens"]], ids=["nobody", "no tokens"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_leaf_takes_part_even_if_nothing_is_used(layout: str, ids: Tensor, engine: str) -> None:
    """A parameter without a gradient makes data-parallel training hang."""
    call = make_call(make_experts(layout, NUM_EXPERTS, engine), ids)
    call.experts(call.hidden_states, call.expert_ids, call.weights).sum().backward()
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in call.leaves().values())


@pytest.mark.parametrize("engine", RAGGED)
def test_activations_that_are_known_are_not_computed_again(engine: str) -> None:
    call = make_call(make_experts("low_rank", NUM_EXPERTS, engine), ANY)
    twice = 2 * call.experts.project(call.hidden_states)[1]
    output = call.experts(call.hidden_states, call.expert_ids, call.weights, projected=twice)
    with torch.no_grad():
        call.experts.gate_down_proj *= 2
    torch.testing.assert_close(output.double(), exact(call)["output"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("activation", ragged.ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_activation(layout: str, activation: str, engine: str) -> None:
    experts = make_experts(layout, NUM_EXPERTS, engine, hidden_act=activation)
    call = make_call(experts, ANY, torch.float64)
    assert_equal(direct(call), exact(call, activation), tolerance=1e-12)


def in_layout(layout: str, call: Call) -> list[Tensor]:
    """The weights of a call as the operator takes them."""
    if layout != "split":
        return dispatch.expert_weights(call.experts)[1]
    return [*call.experts.gate_up_proj.chunk(2, dim=1), call.experts.down_proj]


def apply_operator(layout: str, call: Call, activation: str, num_kept: int, *leaves: Tensor) -> Tensor:
    hidden_states, routing_weights, *weights = leaves
    options = (None, layout, activation, hidden_states.dtype, num_kept)
    return ragged.experts_operator(hidden_states, call.expert_ids, routing_weights, weights, *options)[0]


@pytest.mark.parametrize(("activation", "recompute"), [*((name, False) for name in ragged.ACTIVATIONS), ("gelu", True)])
@pytest.mark.parametrize("layout", ragged.LAYOUTS)
def test_finite_differences(layout: str, activation: str, recompute: bool) -> None:
    own_layout = "swiglu" if layout == "split" else layout
    experts = make_experts(own_layout, 3, hidden_size=8, width=3, rank=2, std=0.5)
    call = make_call(experts, torch.tensor([[0, 3, 2], [3, 3, 3], [2, 0, 3]]), torch.float64)
    leaves = [leaf.detach().requires_grad_() for leaf in (*call[1::2], *in_layout(layout, call))]
    function = partial(apply_operator, layout, call, activation, 0 if recompute else 4)
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("recompute", [False, True])
def test_gate_and_up_in_tensors_of_their_own(recompute: bool) -> None:
    """The layout of dense FFNs."""
    call = make_call(make_experts("swiglu", NUM_EXPERTS), ANY)
    num_kept = 0 if recompute else int((ANY < NUM_EXPERTS).sum())
    weights = in_layout("split", call)
    output = apply_operator("split", call, "silu", num_kept, call.hidden_states, call.weights, *weights)
    assert_equal(differentiate(output, call.probe(), call.leaves()), exact(call))


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives_are_refused(layout: str, engine: str) -> None:
    call = make_call(make_experts(layout, NUM_EXPERTS, engine), ANY)
    output = call.experts(call.hidden_states, call.expert_ids, call.weights)
    (grad,) = torch.autograd.grad(output.square().sum(), call.hidden_states, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives: use experts_implementation='eager'"):
        grad.square().sum().backward()


# Candidates for the products, and the dtype in which the way over float32 has them.
WAYS = {"torch.mm": products._mm, "swapped": products._swapped_mm, "oneDNN": products._onednn}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = {"few rows": random_ids(5, 3, 0.6), "many rows": random_ids(80, 3, 0.6)}
LARGE = {"hidden_size": 256, "width": 512, "rank": 64}


def can(product: products.Product, dtype: torch.dtype) -> bool:
    """Processors without instructions for a dtype have no oneDNN product for it."""
    try:
        product(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype), None)
    except RuntimeError:
        return False
    return True


def use(monkeypatch: pytest.MonkeyPatch, chosen: Products) -> list[int]:
    """Whatever is fastest, these products are used; the returned list grows with every call of one of them."""
    rows: list[int] = []

    def spied(product: products.Product) -> products.Product:
        def call(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
            rows.append(a.shape[0])
            return product(a, b, out)

        return call

    spied_products = Products(chosen.dtype, *(spied(product) for product in chosen[1:]))
    monkeypatch.setattr(ragged, "fastest_products", lambda dtype, num_rows, weight_size: spied_products)
    return rows


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("engine", "way"), [*(("ragged", way) for way in WAYS), ("ragged_recompute", "torch.mm")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(layout: str, engine: str, way: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = use(monkeypatch, Products(torch.float32, *[WAYS[way]] * 3))
    call = make_call(make_experts(layout, 3, engine, std=0.1, **LARGE), ids)
    assert_equal(direct(call), exact(call), tolerance=1e-5)
    assert rows


@pytest.mark.parametrize("ids", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(
    ("engine", "way"), [*(("ragged", way) for way in (*WAYS, "over float32")), ("ragged_recompute", "over float32")]
)
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision(
    layout: str, engine: str, dtype: torch.dtype, way: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error is larger than that of the plain loop in this dtype."""
    if way == "over float32":
        chosen = products.portable_products(torch.float32)
    elif can(WAYS[way], dtype):
        chosen = Products(dtype, *[WAYS[way]] * 3)
    else:
        pytest.skip("no such product on this processor")
    rows = use(monkeypatch, chosen)
    call = make_call(make_experts(layout, 3, engine, std=0.1, **LARGE), ids, dtype)
    expected, found = exact(call), direct(call)
    assert all(value.dtype == dtype for value in found.values())
    plain = errors(one_module_per_expert(call), expected)
    for name, error in errors(found, expected).items():
        limit = 1.1 if found[name].numel() > 100 else 3.0  # chance decides over a few numbers
        assert 0 < error <= limit * plain[name], f"{name}: {error} instead of {plain[name]}"
    assert rows


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_rounded_once(layout: str, dtype: torch.dtype) -> None:
    """The plain loop rounds them after every expert."""
    call = make_call(make_experts(layout, 24), random_ids(40, 24, 1.0), dtype)
    expected = exact(call)
    found, plain = errors(direct(call), expected), errors(one_module_per_expert(call), expected)
    for name in ("output", "hidden_states"):
        assert found[name] < 0.75 * plain[name], f"{name}: {found[name]} instead of {plain[name]}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES.values()], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_is_fastest_here(layout: str, dtype: torch.dtype) -> None:
    """Large enough to be measured, in every dtype."""
    call = make_call(make_experts(layout, 3, std=0.1, **LARGE), ROWS["many rows"], dtype)
    assert call.experts.down_proj[0].numel() >= products.SMALL_WEIGHT
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert_equal(direct(call), exact(call), tolerance)


@pytest.mark.parametrize("engine", RAGGED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_every_time(layout: str, engine: str) -> None:
    call = make_call(make_experts(layout, 3, engine, std=0.1, **LARGE), random_ids(30, 3, 0.6))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = direct(call), direct(call)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
