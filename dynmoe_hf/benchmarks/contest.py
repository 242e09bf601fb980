"""A contest: entrants that do the same thing, measured in turn, each relative to a yardstick."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .memory_use import kept_bytes, peak_bytes

Clock = Callable[[], float]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Entrant:
    """One way of doing it.

    Args:
        name: as in the tables.
        run: what is measured.
        prepare: what has to be done before each run and is not measured.
        yardstick: the entrant that this one is compared with, where it is not the contest's.
        forward: the forward pass alone, which `kept_bytes` measures; its result holds on to what is kept.
        module: holds the parameters, which `kept_bytes` does not count.
    """

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing
    yardstick: str | None = None
    forward: Callable[[], object] | None = None
    module: nn.Module | None = None


@dataclass(frozen=True)
class Contest:
    """Entrants whose results have been found equal, ready to be measured.

    Args:
        title: the shape, in a word or two.
        shape: all sizes, by name.
        dtype: `float32` or `bfloat16`.
        entrants: all of them, the yardstick too.
        yardstick: name of the entrant that the others are compared with, or what to call those that entrants name.
        left_out: entrant -> why it was not measured here.
        notes: what else a reader of the numbers has to know.
        quantities: what is measured, of `MEASURES`.
    """

    title: str
    shape: Mapping[str, Any]
    dtype: str
    entrants: Sequence[Entrant]
    yardstick: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    quantities: Sequence[str] = ("seconds",)


@dataclass(frozen=True)
class Score:
    """One entrant's figures: its quantity over that of its yardstick, round by round."""

    yardstick: str
    yardstick_median: float
    ratios: list[float]
    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class Result:
    """One quantity of a contest, as it is written into the results file."""

    case: str
    title: str
    shape: Mapping[str, Any]
    dtype: str
    quantity: str
    yardstick: str
    scores: dict[str, Score]
    left_out: Mapping[str, str]
    notes: Mapping[str, Any]


def seconds(entrant: Entrant, clock: Clock = time.perf_counter) -> float:
    """Wall-clock time of one run."""
    start = clock()
    entrant.run()
    return clock() - start


def _kept(entrant: Entrant) -> float:
    return kept_bytes(entrant.forward, entrant.module)


def _peak(entrant: Entrant) -> float:
    return peak_bytes(entrant.run)


MEASURES: dict[str, Callable[[Entrant], float]] = {"seconds": seconds, "kept_bytes": _kept, "peak_bytes": _peak}


def measure(
    case: str, contest: Contest, rounds: int, seed: int, measures: Mapping[str, Callable[[Entrant], float]] = MEASURES
) -> list[Result]:
    """The result of every quantity of a contest. Bytes are the same in each round, so one is enough for them."""
    results = []
    for quantity in contest.quantities:
        values = in_turn(contest.entrants, rounds if quantity == "seconds" else 1, seed, measures[quantity])
        scores = {
            entrant.name: _score(values, entrant.name, entrant.yardstick or contest.yardstick)
            for entrant in contest.entrants
        }
        results.append(
            Result(
                case,
                contest.title,
                contest.shape,
                contest.dtype,
                quantity,
                contest.yardstick,
                scores,
                contest.left_out,
                contest.notes,
            )
        )
    return results


def in_turn(
    entrants: Sequence[Entrant], rounds: int, seed: int, measure_one: Callable[[Entrant], float]
) -> dict[str, list[float]]:
    """Entrant -> one value a round; each round takes all of them in another order. One more, the first, is dropped."""
    order = random.Random(seed)
    values: dict[str, list[float]] = {entrant.name: [] for entrant in entrants}
    for _ in range(1 + rounds):
        for entrant in order.sample(entrants, len(entrants)):
            entrant.prepare()
            values[entrant.name].append(measure_one(entrant))
    return {name: series[1:] for name, series in values.items()}


def _score(values: Mapping[str, Sequence[float]], name: str, yardstick: str) -> Score:
    ratios = [own / base for own, base in zip(values[name], values[yardstick], strict=True)]
    quartiles = (ratios[0], ratios[0])
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        quartiles = (low, high)
    return Score(yardstick, statistics.median(values[yardstick]), ratios, statistics.median(ratios), quartiles)
