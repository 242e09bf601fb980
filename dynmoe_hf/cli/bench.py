"""`dynmoe bench`: engines, peers and methods side by side; first that they are equal, then how fast they are."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe_hf.errors import UserError

from .tables import new_console, new_table

if TYPE_CHECKING:
    from rich.console import Console

    from dynmoe_hf.benchmarks.contest import Result, Score

DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("float32", "bfloat16")}
UNITS = {"seconds": "time", "kept_bytes": "bytes kept for the backward pass", "peak_bytes": "peak of both passes"}
PLOTTED = "mean_k"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("--list", action="store_true", help="show the cases, and which of them are the default")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases to run, default: the quick ones")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each entrant (%(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch, default: its own choice")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything works")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write everything that was measured")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of an earlier run")
    parser.epilog = f"With --output, the case {PLOTTED} also draws a FILE.DTYPE.png."


def run(args: argparse.Namespace) -> int | None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.benchmarks import cases

    if args.list:
        _print_cases(new_console())
        return None
    names = list(dict.fromkeys(args.case or cases.default_cases()))
    cases.check_names(names)
    return _measure(args, names)


def _measure(args: argparse.Namespace, names: Sequence[str]) -> int | None:
    import datetime

    import torch

    from dynmoe_hf.benchmarks.cases import run_case
    from dynmoe_hf.benchmarks.equality import WrongResult
    from dynmoe_hf.benchmarks.report import report, write
    from dynmoe_hf.benchmarks.settings import Settings

    pictures = _check(args, names)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    settings = Settings(DTYPES[args.dtype], args.rounds, args.quick)
    command = shlex.join(["dynmoe", *sys.argv[1:]])
    console, results = new_console(), []
    date = datetime.datetime.now(datetime.timezone.utc)
    try:
        for name in names:
            for result in run_case(name, settings):
                results.append(result)
                print_result(console, result)
            if args.output is not None:  # after each case, because the next one may take long
                write(args.output, report(results, settings, command, date))
    except WrongResult as error:
        print(f"dynmoe bench: {error}", file=sys.stderr)
        return 1
    for dtype, picture in pictures.items():
        draw([result for result in results if result.case == PLOTTED and result.dtype == dtype], picture)
    return None


def _check(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Path]:
    """Refuse bad input before any work; dtype -> the picture that will be drawn for it."""
    from dynmoe_hf.benchmarks.report import check_output

    for flag in ("rounds", "threads"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, flag)}.")
    if args.output is None:
        return {}
    if args.output.suffix != ".json":
        raise UserError(f"--output is a JSON file, got {str(args.output)!r}.")
    dtypes = DTYPES[args.dtype] if PLOTTED in names else ()
    pictures = {dtype: args.output.with_suffix(f".{dtype}.png") for dtype in dtypes}
    check_output([args.output, *pictures.values()], args.overwrite)
    if pictures and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"the picture of {PLOTTED} needs matplotlib: pip install matplotlib")
    return pictures


def _print_cases(console: Console) -> None:
    from dynmoe_hf.benchmarks.cases import CASES

    table = new_table("case", "default", "minutes", "what")
    for name, case in CASES.items():
        table.add_row(name, "yes" if case.is_default else "", f"{case.minutes:g}", case.summary)
    console.print(table)
    console.print("Minutes are those of five rounds in float32 on two cores; bfloat16 takes longer on most CPUs.")


def print_result(console: Console, result: Result) -> None:
    """One table: the ratios of every entrant, the best first if all have one yardstick, and who was left out."""
    title = f"{result.case}, {result.title}, {result.dtype}: {UNITS[result.quantity]} over {result.yardstick}"
    console.print(f"\n{title}", style="bold")
    scores = list(result.scores.items())
    if result.yardstick in result.scores:
        scores.sort(key=lambda item: item[1].median)
    table = new_table("entrant", "median", "quartiles", "rounds", numbers=True)
    for name, score in scores:
        low, high = score.quartiles
        spread = f"{low:.2f} ... {high:.2f}" if len(score.ratios) > 1 else ""
        table.add_row(name, f"{score.median:.2f}", spread, str(len(score.ratios)))
    console.print(table)
    for yardstick, median in {score.yardstick: score.yardstick_median for score in result.scores.values()}.items():
        console.print(f"{yardstick}: {_with_unit(median, result.quantity)}")
    for name, reason in result.left_out.items():
        console.print(f"left out: {name}, {reason}", soft_wrap=True)


def _absolute(score: Score) -> float:
    return score.median * score.yardstick_median


def _with_unit(value: float, quantity: str) -> str:
    return f"{1000 * value:,.3g} ms" if quantity == "seconds" else f"{value / 2**20:,.1f} MiB"


def draw(results: Sequence[Result], path: Path) -> None:
    """Time against the mean number of experts, one line an engine."""
    from dynmoe_hf.analysis.plots import plot_time_over_experts

    lines: dict[str, dict[float, float]] = {}
    for result in results:
        for name, score in result.scores.items():
            engine, _, mean = name.partition(" k=")
            lines.setdefault(engine, {})[float(mean)] = _absolute(score)
    plot_time_over_experts(lines, path)
