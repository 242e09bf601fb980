"""The registry of cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dynmoe_hf.errors import UserError
from dynmoe_hf.model.routing import unknown_name

from . import aoe, decode, layers, steps
from .contest import Result, measure
from .settings import Build, Settings


@dataclass(frozen=True)
class Case:
    """A question, and the contests that answer it.

    Args:
        summary: what is compared, in one line.
        plan: the contests, each to be built when its turn comes.
        minutes: of five rounds in float32 on two cores of a server CPU.
        is_default: belongs to a run that names no case.
    """

    summary: str
    plan: Callable[[Settings], list[Build]]
    minutes: float
    is_default: bool = True


CASES: dict[str, Case] = {
    "layer": Case("forward and backward of the experts, shapes a and b, over the products alone", layers.plan_layer, 6),
    "variable_k": Case("the same with 1.76 of at most 4 experts a token", layers.plan_variable_k, 1),
    "decode": Case("1 and 8 tokens through layers that are in no cache, over one read", decode.plan_decode, 3),
    "memory": Case("bytes kept between the passes, and the peak, over grouped_mm", layers.plan_memory, 3),
    "mean_k": Case("time against the mean number of experts, each engine over itself", layers.plan_mean_k, 15, False),
    "step": Case("a training step of ours, Mixtral, OLMoE, Qwen3-MoE, over a dense Llama", steps.plan_step, 12, False),
    "methods": Case("a training step of every method, over top_k", steps.plan_methods, 20, False),
    "aoe_memory": Case("time and bytes of an AoE block, over plain autograd", aoe.plan_aoe_memory, 2, False),
}


def check_names(names: Iterable[str]) -> None:
    """Refuse what is no case.

    Raises:
        UserError: with the nearest name.
    """
    for name in names:
        if name not in CASES:
            raise UserError(unknown_name("case", name, CASES))


def default_cases() -> list[str]:
    """The cases of a run that names none."""
    return [name for name, case in CASES.items() if case.is_default]


def run_case(name: str, settings: Settings) -> Iterator[Result]:
    """Build, check and measure the contests of a case, one after the other.

    Raises:
        WrongResult: an entrant computes something else than the reference.
    """
    for build in CASES[name].plan(settings):
        yield from measure(name, build(), settings.rounds, settings.seed)
