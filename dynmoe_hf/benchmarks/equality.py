"""Nobody is measured whose result is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

FLOAT32_TOLERANCE = 2e-5  # of the largest element of a tensor
BFLOAT16_PLAIN = 0.5  # of the norm of a tensor; wide, because behind a second router some choices flip
BFLOAT16_MULTIPLE = 2.0  # of the error of the plain entrant
BFLOAT16_FLOOR = 1e-3  # for tensors in which the plain entrant happens to be exact

Tensors = Mapping[str, Tensor]


class WrongResult(RuntimeError):
    """An entrant computes something else than the reference."""


def failures_of(
    contestants: Mapping[str, Callable[[], Tensors]],
    exact: Tensors,
    plain: str,
    where: str,
    float32_tolerance: float = FLOAT32_TOLERANCE,
) -> dict[str, str]:
    """Compare every entrant with the exact result; entrant -> message of those that raise an error of their own.

    A float32 result may be wrong by `float32_tolerance` of the largest element of each tensor. The error of a bfloat16
    result, as a norm, may be twice that of the entrant `plain`.

    Args:
        contestants: entrant -> its output and gradients, by name; computed here, one after the other.
        exact: the same tensors, computed in float64.
        plain: one of the contestants, who must not fail.
        where: the contest, for the message.

    Raises:
        WrongResult: for the first that is wrong.
    """
    failures: dict[str, str] = {}
    plain_errors: dict[str, float] = {}
    for entrant in sorted(contestants, key=lambda name: name != plain):
        try:
            result = contestants[entrant]()
        except Exception as error:  # whatever an engine cannot do on this machine is a finding, not the end
            if entrant == plain:
                raise
            failures[entrant] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        is_bfloat16 = any(tensor.dtype == torch.bfloat16 for tensor in result.values())
        for name, expected in exact.items():
            error_of = _norm_error if is_bfloat16 else _largest_error
            found, allowed = error_of(result[name], expected), float32_tolerance
            if is_bfloat16 and entrant == plain:
                plain_errors[name], allowed = found, BFLOAT16_PLAIN
            elif is_bfloat16:
                allowed = BFLOAT16_MULTIPLE * plain_errors[name] + BFLOAT16_FLOOR
            if not found <= allowed:  # also for NaN
                raise WrongResult(
                    f"{entrant} is wrong in {where}: {name} is off by {found:.1e}, more than {allowed:.1e}."
                )
    return failures


def _norm_error(tensor: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item()
    return (tensor.double() - exact).norm().item() / (scale or 1.0)


def _largest_error(tensor: Tensor, exact: Tensor) -> float:
    scale = exact.double().abs().max().item()
    return (tensor.double() - exact).abs().max().item() / (scale or 1.0)
