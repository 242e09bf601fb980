"""The ways to compute a product agree, and one replaces `torch.mm` only where it is clearly faster."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dynmoe_hf.model import products
from dynmoe_hf.model.products import FEW_ROWS, GAIN, ROUNDS, SMALL_WEIGHT, Product, fastest_products, portable_products

SINGLE, DOUBLE, HALF = torch.float32, torch.float64, torch.bfloat16
MANY = 10**6  # rows
CANDIDATES = [
    *((product, dtype) for product in (products._mm, products._swapped_mm) for dtype in (DOUBLE, SINGLE, HALF)),
    (products._onednn, SINGLE),
    (products._onednn, HALF),
]


@pytest.fixture(autouse=True)
def not_measured_yet() -> Iterator[None]:
    """No test sees, or leaves behind, what another one measured."""
    products._measured_products.cache_clear()
    yield
    products._measured_products.cache_clear()


def strided(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(3, dim=1)[:, ::3]


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "strided": strided,
    "part of rows": lambda tensor: torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]],
}


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(5, 7, 9), (1, 16, 8), (40, 1, 3)])
@pytest.mark.parametrize(("product", "dtype"), CANDIDATES)
def test_every_candidate_is_a_product(
    product: Product, dtype: torch.dtype, sizes: tuple[int, int, int], form: str, with_out: bool
) -> None:
    n, k, m = sizes
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((n, k), (k, m)))
    out = torch.full((n, 3 * m), 7.0, dtype=dtype)[:, m : 2 * m] if with_out else None
    result = product(FORMS[form](a), FORMS[form](b), out)
    assert result.dtype == dtype
    tolerance = {DOUBLE: 1e-13, SINGLE: 1e-5, HALF: 2e-2}[dtype]
    torch.testing.assert_close(result.double(), a.double() @ b.double(), rtol=tolerance, atol=tolerance)
    if with_out:
        assert result.data_ptr() == out.data_ptr() and torch.equal(result, out)
        assert (out._base[:, :m] == 7).all() and (out._base[:, 2 * m :] == 7).all(), "it wrote beside its place"


@pytest.mark.parametrize("out_dtype", [SINGLE, HALF])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_the_three_products_of_an_expert(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    rows, grad, weight = (torch.randn(*shape).to(dtype) for shape in ((5, 7), (5, 9), (9, 7)))
    chosen = portable_products(dtype)
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(chosen.forward(rows, weight), rows @ weight.T, **close)
    torch.testing.assert_close(chosen.grad_rows(grad, weight), grad @ weight, **close)
    grad_weight = torch.full((9, 7), torch.nan, dtype=out_dtype)
    chosen.grad_weight(grad, rows, grad_weight)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == out_dtype == SINGLE else close
    torch.testing.assert_close(grad_weight.float(), (grad.T @ rows).float(), **close)


class Clock:
    """A clock that only candidates move: `seconds[name]` for the first call, which warms up, and for every round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(products, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def candidate(self, seconds: Sequence[float]) -> Product:
        left = list(seconds)

        def product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
            self.now += left.pop(0)
            return a

        return product


EVEN = [1.0] * (1 + ROUNDS)
A_BIT = 1.0 / (GAIN - 0.05)
RACES = {
    "clearly faster": (EVEN, [0.5] * (1 + ROUNDS), True),
    "just fast enough": (EVEN, [1.0 / (GAIN + 0.05)] * (1 + ROUNDS), True),
    "a bit faster": (EVEN, [A_BIT] * (1 + ROUNDS), False),
    "slower": (EVEN, [2.0] * (1 + ROUNDS), False),
    "the first one was disturbed once": ([*EVEN[:3], 50.0, *EVEN[4:]], EVEN, False),
    "the first one was disturbed in all rounds but one": ([1.0, 1.0] + [50.0] * (ROUNDS - 1), EVEN, False),
    "fast once": (EVEN, [*EVEN[:3], 0.01, *EVEN[4:]], False),
    "disturbed itself in some rounds": (EVEN, [0.5] * (2 + ROUNDS // 2) + [9.0] * (ROUNDS // 2), True),
    "slow while it warms up": (EVEN, [90.0] + [0.5] * ROUNDS, True),
    "the machine slows down": ([2.0**n for n in range(1 + ROUNDS)], [0.7 * 2**n for n in range(1 + ROUNDS)], True),
    "fast while it warms up": ([90.0] + EVEN[1:], [0.01] + EVEN[1:], False),
}


@pytest.mark.parametrize("race", RACES)
def test_only_a_clear_gain_counts(race: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    first_seconds, seconds, wins = RACES[race]
    first, other = clock.candidate(first_seconds), clock.candidate(seconds)
    pairs = [(torch.ones(1, 1), torch.ones(1, 1))] * ROUNDS
    assert products._fastest(pairs, [first, other]) is (other if wins else first)


def test_the_fastest_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    candidates = [clock.candidate([seconds] * (1 + ROUNDS)) for seconds in (1.0, 0.6, 0.3, 0.5)]
    pairs = [(torch.ones(1, 1), torch.ones(1, 1))] * ROUNDS
    assert products._fastest(pairs, candidates) is candidates[2]


def refuse_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(products, "_fastest", measure)


@pytest.mark.parametrize("num_rows", [10, 1000])
@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF])
def test_small_weights_are_not_measured(dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_measure(monkeypatch)
    assert fastest_products(dtype, num_rows, SMALL_WEIGHT - 1) == portable_products(dtype)
    with pytest.raises(AssertionError, match="measured"):
        fastest_products(SINGLE, num_rows, SMALL_WEIGHT)


def test_deterministic_algorithms_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_measure(monkeypatch)
    torch.use_deterministic_algorithms(True)
    try:
        assert fastest_products(HALF, 10, SMALL_WEIGHT) == portable_products(HALF)
    finally:
        torch.use_deterministic_algorithms(False)


def count_measurements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, int]]:
    """Dtype and rows of every product that is measured."""
    seen = []

    def first(pairs: list[tuple[Tensor, Tensor]], candidates: list[Product]) -> Product:
        a, b = pairs[0]
        assert len(pairs) == ROUNDS and a.shape[1] == b.shape[0]
        assert a.device.type == b.device.type == "cpu"
        seen.append((a.dtype, min(a.shape)))
        return candidates[0]

    monkeypatch.setattr(products, "_fastest", first)
    return seen


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_few_rows_are_not_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their time is that of reading the weight."""
    seen = count_measurements(monkeypatch)
    assert fastest_products(dtype, FEW_ROWS, SMALL_WEIGHT) == portable_products(dtype)
    assert not seen
    fastest_products(dtype, FEW_ROWS + 1, SMALL_WEIGHT)
    assert seen


def test_measured_once_for_each_number_of_rows_dtype_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_measurements(monkeypatch)
    smallest = FEW_ROWS + 1
    for calls, (largest, measured_with) in enumerate(products.ROWS.items(), start=1):
        assert smallest <= measured_with <= largest
        for num_rows in (smallest, min(largest, 10**6)):
            fastest_products(SINGLE, num_rows, SMALL_WEIGHT)
            assert len(seen) == 3 * calls and seen[-1] == (SINGLE, measured_with)
        smallest = largest + 1
    before = len(seen)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    fastest_products(SINGLE, MANY, SMALL_WEIGHT)
    assert seen[before:] == [(SINGLE, measured_with)] * 3
    fastest_products(HALF, MANY, SMALL_WEIGHT)
    assert seen[before + 3 :] == [(HALF, measured_with)] * 4, "three products, and the way over float32"


def test_measured_on_the_cpu_whatever_the_default_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_measurements(monkeypatch)
    with torch.device("meta"):
        fastest_products(SINGLE, MANY, SMALL_WEIGHT)
    assert seen


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE, HALF, torch.float16])
def test_every_dtype_can_be_measured(dtype: torch.dtype) -> None:
    """A candidate that knows nothing of a dtype, or of it on this processor, does not take part."""
    for num_rows in (8, 40):
        chosen = fastest_products(dtype, num_rows, SMALL_WEIGHT)
        rows, weight = (torch.randn(*shape).to(chosen.dtype) for shape in ((num_rows, 24), (16, 24)))
        torch.testing.assert_close(chosen.forward(rows, weight), rows @ weight.T, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("seconds_in_float32", "chosen"), [(0.1, SINGLE), (1.0 / (GAIN - 0.05), HALF), (2.0, HALF)])
@pytest.mark.parametrize("dtype", [HALF, torch.float16])
def test_half_precision_goes_over_float32_where_that_is_faster(
    dtype: torch.dtype, seconds_in_float32: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        clock.now += seconds_in_float32 if a.dtype == SINGLE else 1.0
        return a

    monkeypatch.setattr(products, "_candidates", lambda *_: [product])
    measured = fastest_products(dtype, MANY, SMALL_WEIGHT)
    assert measured.dtype == (SINGLE if chosen == SINGLE else dtype)
    assert measured[1:] == (product,) * 3
