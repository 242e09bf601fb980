"""Pictures of how many experts models use, as PNG files. They need no display."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, Color Universal Design, without black and yellow. The markers tell runs apart in grey, too; one
# more of them than colours makes 42 different pairs.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
NUM_MARKERS = 8


def plot_experts_over_training(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike, key: str = "experts_per_token"
) -> None:
    """Draw the mean number of experts of a token against the optimizer step, one line a run.

    Args:
        runs: name of a run -> the Trainer's `state.log_history` with a `RoutingCallback`, or the `log_history` of its
            trainer_state.json. Entries without the key are skipped.
        path: PNG file to write.
        key: `eval_experts_per_token` draws the evaluations instead.

    Raises:
        ValueError: there is no run, or one without any such entry.
        ImportError: matplotlib is not installed.
    """
    lines = {
        name: [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
        for name, history in runs.items()
    }
    for name, points in lines.items():
        if not points:
            raise ValueError(f"the log of run {name!r} has no entry with {key!r}; train with a RoutingCallback.")
    figure, axes = _figure(lines)
    for (name, points), style in zip(lines.items(), _styles(), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, markevery=max(1, len(steps) // NUM_MARKERS), **style)
    axes.set_xlabel("Optimizer step")
    axes.set_ylabel("Experts per token, mean over layers")
    axes.set_title("Experts per token during training")
    _save(figure, axes, path)


def plot_experts_per_layer(runs: Mapping[str, Sequence[float]], path: str | os.PathLike) -> None:
    """Draw the mean number of experts of a token in each MoE layer, one line a run.

    Args:
        runs: name of a run -> mean number of experts at each router, from the first to the last; a cartesian layer has
            two, one a bank.
        path: PNG file to write.

    Raises:
        ValueError: there is no run, or one without layers.
        ImportError: matplotlib is not installed.
    """
    for name, values in runs.items():
        if not values:
            raise ValueError(f"run {name!r} has no MoE layer to draw.")
    figure, axes = _figure(runs)
    for (name, values), style in zip(runs.items(), _styles(), strict=False):
        axes.plot(range(len(values)), values, label=name, **style)
    axes.set_xlabel("Router (0 is next to the embedding)")
    axes.set_ylabel("Experts per token, mean over tokens")
    axes.set_title("Experts per token in each layer")
    _save(figure, axes, path)


def plot_time_over_experts(lines: Mapping[str, Mapping[float, float]], path: str | os.PathLike) -> None:
    """Draw the time of a layer against the mean number of experts of a token, one line an engine.

    Args:
        lines: name of an engine -> seconds by mean number of experts.
        path: PNG file to write.

    Raises:
        ValueError: there is no engine.
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(lines)
    for (name, points), style in zip(lines.items(), _styles(), strict=False):
        means = sorted(points)
        axes.plot(means, [1000 * points[mean] for mean in means], label=name, **style)
    axes.set_xlabel("Experts per token, mean over tokens")
    axes.set_ylabel("Milliseconds, forward and backward")
    axes.set_title("Time of a layer against the experts used")
    _save(figure, axes, path)


def plot_quality_over_experts(
    lines: Mapping[str, Sequence[tuple[float, float, float]]], path: str | os.PathLike, metric: str
) -> None:
    """Draw a metric against the mean number of experts of a token, one line a task, with bars of one standard error.

    Args:
        lines: name of a task -> experts per token, value and standard error, at each setting of one checkpoint.
        path: PNG file to write.
        metric: what the values are, for the axis.

    Raises:
        ValueError: there is no task.
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(lines)
    for (name, points), style in zip(lines.items(), _styles(), strict=False):
        experts, values, errors = zip(*sorted(points), strict=True)
        axes.errorbar(experts, values, yerr=errors, capsize=3, label=name, **style)
    axes.set_xlabel("Experts per token, mean over tokens and layers")
    axes.set_ylabel(metric)
    axes.set_title("Quality against compute of one checkpoint")
    axes.set_xlim(left=0)
    _save(figure, axes, path)


def _figure(runs: Mapping[str, Any]) -> tuple[Figure, Axes]:
    if not runs:
        raise ValueError("there is no run to draw.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    # A Figure of its own draws PNGs with Agg, and leaves the back end of the caller's pyplot alone.
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _styles() -> Iterator[dict[str, Any]]:
    for colour, marker in zip(cycle(COLOURS), cycle(MARKERS), strict=False):
        yield {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}


def _save(figure: Figure, axes: Axes, path: str | os.PathLike) -> None:
    axes.set_ylim(0, 1.08 * max(axes.dataLim.y1, 1))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png")
