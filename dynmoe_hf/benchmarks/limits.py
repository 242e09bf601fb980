"""What nobody can beat: the same FLOPs as plain products, and the same bytes as plain reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

PROBE_ROWS = 4096  # of products that only choose a library
PROBES = 3


Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # (m, k), (k, n) and memory that it may use -> (m, n)


def _mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.mm(left, right, out=out)


def _swapped_mm(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.mm(right.t(), left.t()).t()


def _onednn(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


def libraries() -> dict[str, Product]:
    """The ways to a dense product that this build of torch has."""
    found = {"torch.mm": _mm, "torch.mm, swapped": _swapped_mm}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found["mkldnn._linear_pointwise"] = _onednn
    return found


class Gemm:
    """The six products of a SwiGLU layer's training step on P rows that all have the same weights.

    Each goes through the library that is the fastest for it on this machine, which a trial decides.

    Args:
        num_rows: P.
        hidden_size: D.
        width: I.
        dtype: of all operands.
        seed: of their values.
    """

    def __init__(self, num_rows: int, hidden_size: int, width: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        rows, inner = draw(num_rows, hidden_size), draw(num_rows, width)
        grad_inner, grad_output = draw(num_rows, 2 * width), draw(num_rows, hidden_size)
        gate_up, down = draw(2 * width, hidden_size), draw(hidden_size, width)
        self.products: dict[str, tuple[Tensor, Tensor]] = {
            "gate_up": (rows, gate_up.t()),
            "down": (inner, down.t()),
            "gradient of inner": (grad_output, down),
            "gradient of rows": (grad_inner, gate_up),
            "gradient of gate_up": (grad_inner.t(), rows),
            "gradient of down": (grad_output.t(), inner),
        }
        self.library = {name: _fastest(libraries(), *pair) for name, pair in self.products.items()}
        self.outputs = {
            name: left.new_empty(left.shape[0], right.shape[1]) for name, (left, right) in self.products.items()
        }

    @property
    def flops(self) -> int:
        """18 P D I."""
        return sum(2 * left.shape[0] * left.shape[1] * right.shape[1] for left, right in self.products.values())

    def run(self) -> None:
        available = libraries()
        for name, (left, right) in self.products.items():
            available[self.library[name]](left, right, self.outputs[name])


def _fastest(candidates: Mapping[str, Product], left: Tensor, right: Tensor) -> str:
    """Name of the library that is the fastest for a product, tried on a part of its rows if they are many."""
    left = left[:PROBE_ROWS]
    if left.shape[1] > PROBE_ROWS:
        left, right = left[:, :PROBE_ROWS], right[:PROBE_ROWS]
    output = left.new_empty(left.shape[0], right.shape[1])
    calls = {name: partial(library, left, right, output) for name, library in candidates.items()}
    return fastest_call(calls)


def fastest_call(calls: Mapping[str, Callable[[], object]]) -> str:
    """Name of the call whose shortest of some runs is the shortest; a first run of each does not count."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(1 + PROBES):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return min(best, key=best.__getitem__)


CHUNK = 2**16  # float32 elements: small enough to stay in a core's own cache


def _copy_in_chunks(values: Tensor) -> None:
    buffer = torch.empty(CHUNK)
    for chunk in values.split(CHUNK):
        buffer[: chunk.numel()].copy_(chunk)


def _row_sums(values: Tensor) -> None:
    width = min(1024, values.numel())
    rows = values[: values.numel() // width * width].view(-1, width)
    rows @ torch.ones(width)


READERS: dict[str, Callable[[Tensor], object]] = {
    "sum": torch.sum,
    "matrix times ones": _row_sums,
    "copy in chunks": _copy_in_chunks,
}


def read(reader: str, tensor: Tensor) -> None:
    """Read a contiguous tensor of any dtype once."""
    READERS[reader](tensor.flatten().view(torch.float32))
