"""The cases `layer`, `variable_k`, `mean_k` and `memory`: one layer of SwiGLU experts, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .contest import Contest, Entrant
from .equality import failures_of
from .limits import Gemm
from .peers import REFERENCE, Builder, Experts, build_dense, build_engine, entrants_of, own_engines
from .settings import Build, Settings
from .shapes import DTYPES, Problem, Shape, shapes, variable

CHECK_TOKENS = 64  # with which the reference is bearable; the other check is at full size
PLAIN = "module_loop"
MEAN_EXPERTS = 1.76  # of a trained top_p model, the mean over the tasks of Huang et al. (arXiv 2403.07652)
MEANS = (1, 2, 4, 8, 16)
BASE_MEAN = 2


class Pass:
    """A forward and a backward pass of one entrant; hidden states, routing weights and parameters get gradients."""

    def __init__(self, experts: Experts, problem: Problem) -> None:
        self.experts = experts
        self.hidden_states = problem.hidden_states.detach().requires_grad_()
        self.routing = problem.routing._replace(weights=problem.routing.weights.detach().requires_grad_())
        self.grad_output = problem.grad_output

    def clear(self) -> None:
        self.experts.module.zero_grad(set_to_none=True)
        self.hidden_states.grad = self.routing.weights.grad = None

    def forward(self) -> Tensor:
        return self.experts.call(self.hidden_states, self.routing)

    def run(self) -> Tensor:
        output = self.forward()
        output.backward(self.grad_output)
        return output

    def results(self) -> dict[str, Tensor]:
        """Output and all gradients; those of unused slots mean nothing."""
        output = self.run().detach()
        results = {
            "output": output,
            "gradient of hidden_states": self.hidden_states.grad,
            "gradient of routing weights": self.routing.weights.grad.masked_fill(~self.routing.used, 0.0),
        }
        results |= {f"gradient of {name}": gradient for name, gradient in self.experts.gradients().items()}
        self.clear()
        return results


def check(builders: Mapping[str, Builder], problem: Problem, where: str) -> dict[str, str]:
    """Every entrant against the reference on a few tokens, and on all of them against the loop over modules.

    Both are computed in float64. Returns the entrants that cannot run, each with the reason.
    """
    few = problem.first(CHECK_TOKENS)
    reference = partial(build_engine, REFERENCE, "varying")
    failures: dict[str, str] = {}
    for part, build in ((few, reference), (problem, builders[PLAIN])):
        exact_part = part.to(torch.float64)
        exact = Pass(build(exact_part.weights), exact_part).results()
        left = {name: builder for name, builder in builders.items() if name not in failures}
        failures |= failures_of(
            {name: _results_of(builder, part) for name, builder in left.items()}, exact, PLAIN, where
        )
    return failures


def _results_of(builder: Builder, problem: Problem) -> Callable[[], dict[str, Tensor]]:
    return lambda: Pass(builder(problem.weights), problem).results()


def _checked(
    problem: Problem, where: str, names: Collection[str] | None = None
) -> tuple[dict[str, Builder], dict[str, str]]:
    """The entrants of a problem, or some of them, that can run and are right; the others with the reason."""
    builders, left_out = entrants_of(problem.shape, problem.hidden_states.dtype)
    if names is not None:
        builders = {name: build for name, build in builders.items() if name in names or name == PLAIN}
        left_out = {name: reason for name, reason in left_out.items() if name in names}
    failures = check(builders, problem, where)
    return {name: build for name, build in builders.items() if name not in failures}, left_out | failures


def _entrant(name: str, build: Builder, problem: Problem, yardstick: str | None = None) -> Entrant:
    step = Pass(build(problem.weights), problem)
    return Entrant(name, step.run, step.clear, yardstick, step.forward, step.experts.module)


def layer_contest(case: str, shape: Shape, dtype: str, seed: int) -> Contest:
    """Every entrant of a layer, and beside them one dense FFN and the products alone."""
    problem = Problem.draw(shape, DTYPES[dtype], seed)
    builders, left_out = _checked(problem, f"{case} {shape.name} in {dtype}")
    entrants = [_entrant(name, build, problem) for name, build in builders.items()]
    entrants.append(_dense_entrant(problem, seed))
    sizes = (shape.num_pairs, shape.hidden_size, shape.width)
    gemm = Gemm(*sizes, DTYPES[dtype], seed)
    entrants.append(Entrant("gemm", gemm.run))
    notes = {"gemm_flops": gemm.flops, "gemm_library": gemm.library}
    if dtype != "float32":
        entrants.append(Entrant("gemm_float32", Gemm(*sizes, torch.float32, seed).run))
    return Contest(shape.name, shape.describe(), dtype, entrants, "gemm", left_out, notes)


def _dense_entrant(problem: Problem, seed: int) -> Entrant:
    module = build_dense(problem.shape, problem.hidden_states.dtype, seed)
    step = Pass(Experts(module, lambda hidden_states, routing: module(hidden_states)), problem)
    return Entrant("dense", step.run, step.clear)


def mean_k_contest(base: Shape, dtype: str, seed: int) -> Contest:
    """Our engines and grouped_mm at several mean numbers of experts, each relative to itself at `BASE_MEAN`."""
    names = [*own_engines(), "grouped_mm_padded", "grouped_mm_flat"]
    means = [mean for mean in MEANS if mean <= base.num_experts]
    weights = Problem.draw(base, DTYPES[dtype], seed).weights
    entrants: dict[str, list[Entrant]] = {name: [] for name in names}
    left_out: dict[str, str] = {}
    for mean in means:
        problem = Problem.draw(variable(base, base.num_experts, mean), DTYPES[dtype], seed)
        problem = replace(problem, weights=weights)
        builders, refused = _checked(problem, f"mean_k = {mean} in {dtype}", names)
        left_out |= {f"{name} k={mean}": reason for name, reason in refused.items()}
        for name in names:
            if name in builders:
                entrants[name].append(_entrant(f"{name} k={mean}", builders[name], problem, f"{name} k={BASE_MEAN}"))
    shape = base.describe() | {"mean_experts": means, "num_slots": base.num_experts}
    shape["num_pairs"] = [mean * base.num_tokens for mean in means]
    return Contest(base.name, shape, dtype, sum(entrants.values(), []), f"itself at k={BASE_MEAN}", left_out)


def memory_contest(shape: Shape, dtype: str, seed: int) -> Contest:
    """What every entrant keeps between the passes and its peak, relative to transformers' grouped_mm."""
    problem = Problem.draw(shape, DTYPES[dtype], seed)
    builders, left_out = _checked(problem, f"memory {shape.name} in {dtype}")
    entrants = [_entrant(name, build, problem) for name, build in builders.items()]
    yardstick = "grouped_mm" if shape.mean_experts is None else "grouped_mm_padded"
    quantities = ("kept_bytes", "peak_bytes")
    return Contest(shape.name, shape.describe(), dtype, entrants, yardstick, left_out, quantities=quantities)


def _variable_shape(settings: Settings) -> Shape:
    base = shapes(settings.quick)["a"]
    return replace(variable(base, 4, MEAN_EXPERTS), name="a, variable k")


def plan_layer(settings: Settings) -> list[Build]:
    """The contests of `layer`: each shape and dtype."""
    return [
        partial(layer_contest, "layer", shape, dtype, settings.seed)
        for dtype in settings.dtypes
        for shape in shapes(settings.quick).values()
    ]


def plan_variable_k(settings: Settings) -> list[Build]:
    """The contests of `variable_k`, one a dtype."""
    return [
        partial(layer_contest, "variable_k", _variable_shape(settings), dtype, settings.seed)
        for dtype in settings.dtypes
    ]


def plan_mean_k(settings: Settings) -> list[Build]:
    """The contests of `mean_k`, one a dtype."""
    base = shapes(settings.quick)["a"]
    return [partial(mean_k_contest, base, dtype, settings.seed) for dtype in settings.dtypes]


def plan_memory(settings: Settings) -> list[Build]:
    """The contests of `memory`: the shapes of `layer` and `variable_k`."""
    return [
        partial(memory_contest, shape, dtype, settings.seed)
        for dtype in settings.dtypes
        for shape in (*shapes(settings.quick).values(), _variable_shape(settings))
    ]
