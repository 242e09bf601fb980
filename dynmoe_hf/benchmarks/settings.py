"""What a user chooses for a whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .contest import Contest

Build = Callable[[], Contest]  # checks the entrants, too; one contest is alive at a time


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    Args:
        dtypes: `float32`, `bfloat16` or both.
        rounds: of every contest, at least 1.
        quick: tiny shapes, which show that everything works and no more.
        seed: of all inputs and of the order in each round.
    """

    dtypes: Sequence[str] = ("float32",)
    rounds: int = 5
    quick: bool = False
    seed: int = 0
