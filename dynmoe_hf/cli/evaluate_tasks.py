"""`dynmoe evaluate --tasks`: scores of lm-evaluation-harness beside the experts that the tokens used."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe_hf import __version__

from .folders import empty_folder
from .model_arguments import load
from .tables import new_console, new_table

if TYPE_CHECKING:
    from rich.table import Table

    from dynmoe_hf import DynMoeForCausalLM

EVALUATION = "evaluation.json"
TABLE = "table.txt"
WIDTH = 160
PACKAGES = ("lm_eval", "torch", "transformers")
LM_EVAL_MISSING = "--tasks needs lm-evaluation-harness: pip install 'dynmoe-hf[eval]'"


def add_task_arguments(parser: argparse.ArgumentParser) -> list[str]:
    """Declare the arguments that need --tasks; returns their names in the namespace."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness")
    group.add_argument("--tasks", metavar="NAMES", help="run these tasks instead of reading text: piqa,arc_easy")
    actions = [
        group.add_argument("--include-path", metavar="FOLDER", help="folder of further tasks, such as configs/eval"),
        group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt; default: the task's"),
        group.add_argument(
            "--gen-kwargs", metavar="K=V,...", help="changes to the options of tasks that generate: max_gen_toks=32"
        ),
        group.add_argument("--apply-chat-template", action="store_true", help="ask through the tokenizer's template"),
        group.add_argument("--seed", type=int, metavar="N", help="of every random choice; default: those of lm_eval"),
        group.add_argument(
            "--bootstrap-iters",
            type=int,
            metavar="N",
            help="resamples for the standard error of what is no mean, default 100; 0: no standard errors",
        ),
        group.add_argument(
            "--sweep", metavar="OPTION=V,...", help="run at each value of an option of the routing: selector.p=0.1,0.2"
        ),
        group.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in --output"),
    ]
    return [action.dest for action in actions]


def run_on_tasks(args: argparse.Namespace) -> None:
    """Run the command. Raises UserError for what the user can mend."""
    from dynmoe_hf.errors import UserError, user_errors

    with user_errors():
        _check(args)
        option, values = _parse_sweep(args.sweep)
        try:
            from dynmoe_hf.evaluation.harness import load_tasks
        except ModuleNotFoundError as error:
            raise UserError(f"{LM_EVAL_MISSING} ({error}).") from error
        model, tokenizer = load(args)
        changes = [_nested(option, value) for value in values]
        for change in changes:
            with model.routing_override(**change):
                pass
        tasks = load_tasks(
            args.tasks.split(","),
            include_path=args.include_path,
            num_fewshot=args.num_fewshot,
            gen_kwargs=_parse_options(args.gen_kwargs),
            seed=args.seed,
            max_length=model.config.max_position_embeddings,
        )
        if args.output is not None:
            _empty(args.output, args.overwrite)
    points = []
    for change in changes or [{}]:
        with model.routing_override(**change):
            points.append(_evaluate(args, model, tokenizer, tasks))
    report = {"model": args.model, **_settings(args)}
    if args.sweep is None:
        report |= points[0]
    else:
        points = [{"value": value, **point} for value, point in zip(values, points, strict=True)]
        report["sweep"] = {"option": option, "points": points}
    _deliver(args, report)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is loaded."""
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num-fewshot must be at least 0, got {args.num_fewshot}.")
    if args.bootstrap_iters is not None and args.bootstrap_iters < 0:
        raise ValueError(f"--bootstrap-iters must be at least 0, got {args.bootstrap_iters}.")
    if args.include_path is not None and not Path(args.include_path).is_dir():
        raise ValueError(f"--include-path {args.include_path!r} is not a folder.")


def _parse_sweep(text: str | None) -> tuple[str, list[Any]]:
    """The option and its values in `selector.p=0.1,0.2`; no value without a text."""
    if text is None:
        return "", []
    option, _, values = text.partition("=")
    option = option.removeprefix("routing.")
    try:
        found = [json.loads(value) for value in values.split(",")]
    except json.JSONDecodeError as error:
        raise ValueError(f"--sweep must look like selector.p=0.1,0.2,0.4, got {text!r}.") from error
    return option, found


def _nested(option: str, value: Any) -> dict[str, Any]:
    """What `selector.p` at a value is to `routing_override`."""
    for name in reversed(option.split(".")):
        value = {name: value}
    return value


def _parse_options(text: str | None) -> dict[str, Any] | None:
    from lm_eval.utils import simple_parse_args_string

    return None if text is None else simple_parse_args_string(text)


def _empty(folder: Path, overwrite: bool) -> None:
    """Leave an empty folder, or raise UserError."""
    plots = [entry.name for entry in folder.glob("*_over_experts.png")] if folder.is_dir() else []
    empty_folder(folder, {EVALUATION, TABLE, *plots}, "evaluation", overwrite)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    settings = ("num_fewshot", "limit", "batch_size", "gen_kwargs", "apply_chat_template", "seed", "quantize")
    versions = {"dynmoe_hf": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"settings": {name: getattr(args, name) for name in settings}, "versions": versions}


def _evaluate(args: argparse.Namespace, model: DynMoeForCausalLM, tokenizer: Any, tasks: Any) -> dict[str, Any]:
    """Results and compute of the tasks at the model's present routing, in plain numbers."""
    from dynmoe_hf.evaluation.harness import run_tasks
    from dynmoe_hf.evaluation.task_compute import task_compute

    found, counts = run_tasks(
        model,
        tokenizer,
        tasks,
        batch_size=args.batch_size,
        limit=args.limit,
        seed=args.seed,
        bootstrap_iters=100 if args.bootstrap_iters is None else args.bootstrap_iters,
        apply_chat_template=args.apply_chat_template,
    )
    results = {
        name: {metric: _number(value) for metric, value in metrics.items() if "," in metric}
        for name, metrics in found["results"].items()
    }
    results = {name: metrics for name, metrics in results.items() if metrics}
    return {
        "routing": model.config.routing,
        "layer_routing": model.config.layer_routing,
        "results": results,
        "compute": {name: task_compute(model.config, counts[name]) for name in results},
        "examples": {name: found["results"][name]["sample_len"] for name in results},
        "num_fewshot": {name: found["n-shot"].get(name) for name in results},
        "higher_is_better": {name: found["higher_is_better"].get(name, {}) for name in results},
        "task_versions": {name: found["versions"].get(name) for name in results},
    }


def _number(value: Any) -> float | None:
    """A metric as JSON can hold it: the harness writes `N/A` for a standard error that it does not have."""
    return float(value) if not isinstance(value, str) and math.isfinite(value) else None


def _deliver(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the report, and write it to --output."""
    text = json.dumps(report, indent=2)
    table = _table(report)
    if args.output is not None:
        (args.output / EVALUATION).write_text(f"{text}\n", encoding="utf-8")
        with (args.output / TABLE).open("w", encoding="utf-8") as file:
            new_console(file=file, width=WIDTH).print(table)
        if "sweep" in report:
            _plot(report, args.output)
    if args.json:
        print(text)
    else:
        # Where no terminal sets a width, rows are better long than folded.
        new_console(width=None if sys.stdout.isatty() else WIDTH).print(table)


def _points(report: dict[str, Any]) -> list[dict[str, Any]]:
    return report["sweep"]["points"] if "sweep" in report else [report]


def _metrics(results: dict[str, float | None]) -> Iterator[tuple[str, float | None, float | None]]:
    """Name, value and standard error of each metric of a task; the name of a filter is shown if it has one."""
    for key, value in results.items():
        metric, _, metric_filter = key.partition(",")
        if not metric.endswith("_stderr"):
            name = metric if metric_filter == "none" else key
            yield name, value, results.get(f"{metric}_stderr,{metric_filter}")


def _table(report: dict[str, Any]) -> Table:
    option = [report["sweep"]["option"]] if "sweep" in report else []
    costs = ("experts/token:\nprompt", "experts/token:\ncontinuation", "active\nparameters", "FLOPs\nper token")
    table = new_table(*option, "task", "examples", "metric", "value", *costs, numbers=True)
    for point in _points(report):
        for task, results in point["results"].items():
            compute = point["compute"][task]
            experts = compute["experts_per_token"]
            first = [str(point["value"])] if option else []
            first += [task, f"{point['examples'][task]:,}"]
            last = [_spread(experts["prompt"]), _spread(experts["continuation"])]
            last += [_short(compute["active_parameters"]), _short(compute["flops_per_token"])]
            for metric, value, stderr in _metrics(results):
                shown = "-" if value is None else f"{value:.4f}"
                table.add_row(*first, metric, shown if stderr is None else f"{shown} ± {stderr:.4f}", *last)
                first, last = [""] * len(first), [""] * len(last)
    return table


def _spread(summary: dict[str, Any] | None) -> str:
    return "-" if summary is None else f"{summary['mean']:.3f} ± {summary['std']:.3f}"


def _short(number: int) -> str:
    """1,234,567 as 1.23 M."""
    power = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".rstrip()


def _plot(report: dict[str, Any], folder: Path) -> None:
    """One picture a metric, of the tasks whose first metric it is."""
    from dynmoe_hf.analysis.plots import plot_quality_over_experts

    pictures: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for point in _points(report):
        for task, results in point["results"].items():
            metric, value, stderr = next(_metrics(results))
            summary = point["compute"][task]["experts_per_token"]["all"]
            if value is not None and summary is not None:
                line = pictures.setdefault(metric, {}).setdefault(task, [])
                line.append((summary["mean"], value, stderr or 0.0))
    for metric, lines in pictures.items():
        plot_quality_over_experts(lines, folder / f"{metric.replace(',', '_')}_over_experts.png", metric)
