# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""The three matrix products of an expert's rows on a CPU, by the fastest way that torch offers on this machine.

`torch.mm` is not that everywhere: its library leaves half of the speed of some processors unused in float32, is slow
for a few rows, and without bfloat16 instructions a product in float32 takes a fraction of the time. So the candidates
are measured once per process, dtype and number of rows, and one replaces `torch.mm` only where it is clearly faster.

Two processes may choose differently where the measurement is disturbed, and then round differently.
`torch.use_deterministic_algorithms(True)` keeps `torch.mm` everywhere.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# a (n, k), b (k, m), and where to write -> a @ b (n, m)
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

MEASURED = (torch.float32, torch.bfloat16, torch.float16)
GAIN = 1.25  # how much faster than torch.mm a product must be
SMALL_WEIGHT = 2**17  # elements of a weight below which nothing is gained and torch.mm stays
FEW_ROWS = 4  # up to so many the time goes into reading the weight, and torch.mm stays
ROWS = {32: 16, 2**63: 64}  # number of rows up to -> number of rows that it is measured with
ROUNDS = 5
ROWS_TO_PACK = 32  # up to this many, packed weights are used


class Products(NamedTuple):
    """The products of rows (n, in) with one expert's weight (out, in), in `dtype`; each can write into `out`."""

    dtype: torch.dtype
    rows_by_weight: Product  # rows (n, in), weight.t() (in, out)
    grad_by_weight: Product  # grad (n, out), weight (out, in)
    grad_by_rows: Product  # grad.t() (out, n), rows (n, in)

    def forward(self, rows: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, in) and (out, in), of any dtype or packed, -> (n, out)."""
        if weight.is_mkldnn:
            return _into(out, _onednn_linear(rows, weight))
        return self.rows_by_weight(rows, cast(weight, self.dtype).t(), out)

    def grad_rows(self, grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, out) and (out, in), of any dtype, -> gradient (n, in) of the rows."""
        return self.grad_by_weight(grad, cast(weight, self.dtype), out)

    def grad_weight(self, grad: Tensor, rows: Tensor, out: Tensor | None) -> None:
        """(n, out) and (n, in) -> gradient (out, in) of the weight, written into `out` of any dtype, if it is given."""
        if out is None:
            return
        if out.dtype == self.dtype:
            self.grad_by_rows(grad.t(), rows, out)
        else:
            out.copy_(self.grad_by_rows(grad.t(), rows, None))


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this dtype. `Tensor.to` takes time even where it changes nothing, which few rows would notice."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def portable_products(dtype: torch.dtype) -> Products:
    """All by `torch.mm`."""
    return Products(dtype, _mm, _mm, _mm)


def fastest_products(dtype: torch.dtype, num_rows: int, weight_size: int) -> Products:
    """The products for so many rows and weights of so many elements; measures when it is asked for the first time.

    Their `dtype` is `dtype`, or float32 where the way over float32 is faster for bfloat16 and float16.
    """
    if num_rows <= FEW_ROWS or weight_size < SMALL_WEIGHT or dtype not in MEASURED:
        return portable_products(dtype)
    if torch.are_deterministic_algorithms_enabled():
        return portable_products(dtype)
    limit = next(limit for limit in ROWS if num_rows <= limit)
    return _measured_products(dtype, ROWS[limit], torch.get_num_threads())


def pack(weight: Tensor) -> Tensor:
    """A copy of one expert's weight (out, in) in the layout of oneDNN, for `Products.forward`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_TO_PACK)


@cache
def packing_pays(dtype: torch.dtype) -> bool:
    """A packed weight is multiplied with one row clearly faster than any other."""
    if not _has_onednn() or dtype not in MEASURED:
        return False
    rows = torch.ones(1, 512, dtype=dtype, device="cpu")
    weights = [torch.ones(1024, 512, dtype=dtype, device="cpu") for _ in range(ROUNDS)]
    try:
        packed = {weight.data_ptr(): pack(weight) for weight in weights}
    except RuntimeError:
        return False

    def by_packed(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
        return _onednn_linear(a, packed[b.data_ptr()])

    pairs = [(rows, weight.t()) for weight in weights]
    return _fastest(pairs, [_mm, by_packed]) is by_packed


def _mm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return torch.mm(a, b, out=out)


def _swapped_mm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _into(out, torch.mm(b.t(), a.t()).t())


def _onednn(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _into(out, _onednn_linear(a, b.t()))


def _onednn_linear(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def _candidates() -> list[Product]:
    return [_mm, _swapped_mm] + [_onednn] * _has_onednn()


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@cache
def _measured_products(dtype: torch.dtype, num_rows: int, num_threads: int) -> Products:
    """The fastest products for `num_rows` rows; `num_threads` only tells when to measure anew."""
    rows = torch.ones(num_rows, 512, dtype=dtype, device="cpu")
    grad = torch.ones(num_rows, 1024, dtype=dtype, device="cpu")
    # More than one weight, because those of experts are seldom in a cache.
    weights = [torch.ones(1024, 512, dtype=dtype, device="cpu") for _ in range(ROUNDS)]
    products = Products(
        dtype,
        _fastest([(rows, weight.t()) for weight in weights], _candidates()),
        _fastest([(grad, weight) for weight in weights], _candidates()),
        _fastest([(grad.t(), rows)] * ROUNDS, _candidates()),
    )
    if dtype == torch.float32:
        return products
    by_float32 = _measured_products(torch.float32, num_rows, num_threads)

    def over_float32(rows: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        return by_float32.rows_by_weight(rows.float(), weight.float(), None).to(dtype)

    pairs = [(rows, weight.t()) for weight in weights]
    fastest = _fastest(pairs, [products.rows_by_weight, over_float32])
    return by_float32 if fastest is over_float32 else products


def _can(candidate: Product, a: Tensor, b: Tensor) -> bool:
    """Whether this processor has the product: oneDNN asks some for float16."""
    try:
        candidate(a, b, None)
    except RuntimeError:
        return False
    return True


def _fastest(pairs: list[tuple[Tensor, Tensor]], candidates: list[Product]) -> Product:
    """The candidate that computes these products fastest, or the first one in doubt."""
    candidates = [candidate for candidate in candidates if _can(candidate, *pairs[0])]  # and they are warm then
    times: list[list[float]] = []
    for a, b in pairs:
        times.append([])
        for candidate in candidates:
            start = time.perf_counter()
            candidate(a, b, None)
            times[-1].append(time.perf_counter() - start)
    gains = []
    for measured in zip(*times, strict=True):
        # Of all rounds and within a round: something else on the machine may slow one or the other down, seldom both.
        rounds = [first[0] / seconds for first, seconds in zip(times, measured, strict=True)]
        gains.append(min(statistics.median(rounds), min(first[0] for first in times) / min(measured)))
    best = max(range(len(candidates)), key=gains.__getitem__)
    return candidates[best] if gains[best] >= GAIN else candidates[0]
