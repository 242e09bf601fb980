"""Measured results as tables for readers and as the entries that the Hub shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from .records import TextSource, TrainingRecord, is_number

TASK_TYPE, TASK_NAME = "text-generation", "Text Generation"
TEXT_METRICS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "experts_per_token": "experts per token",
}


@dataclass(frozen=True)
class ResultTable:
    """What one evaluation found.

    Args:
        caption: what was measured, on what.
        markdown: the table.
        entries: the same for the Hub.
        is_text: whether text was predicted, in contrast to tasks.
        subject: the text that `experts_per_token` is a mean over.
        experts_per_token: over tokens and routers, if it was measured on plain text.
    """

    caption: str
    markdown: str
    entries: list[EvalResult]
    is_text: bool
    subject: str | None = None
    experts_per_token: float | None = None


def training_table(training: TrainingRecord) -> ResultTable | None:
    """What `dynmoe train` measured at its end; None if the folder does not say."""
    metrics = {name: training.metrics[f"eval_{name}"] for name in TEXT_METRICS if f"eval_{name}" in training.metrics}
    source = training.text or TextSource(None, "text of the same kind")
    caption = f"At the end of training, on text that was held out from it ({source.words}):"
    return _text_table(caption, metrics, source, "validation") if "bits_per_byte" in metrics else None


def evaluation_tables(reports: Sequence[Mapping[str, Any]]) -> list[ResultTable]:
    """One table for each report of `dynmoe evaluate`."""
    tables = []
    for report in reports:
        if "results" in report:
            tables.append(_task_table(report))
        else:
            split, source = str(report.get("split", "test")), report["dataset"]
            tokens = f", {report['tokens']:,} tokens" if is_number(report.get("tokens")) else ""
            length = f" in sequences of {report['block_size']}" if is_number(report.get("block_size")) else ""
            caption = f"By `dynmoe evaluate`, on the {split} split of {source.words}{tokens}{length}:"
            metrics = {name: report[name] for name in TEXT_METRICS if is_number(report.get(name))}
            tables.append(_text_table(caption, metrics, source, split))
    return tables


def _text_table(caption: str, metrics: Mapping[str, float], source: TextSource, split: str) -> ResultTable:
    rows = [(TEXT_METRICS[name], f"{value:.4g}") for name, value in metrics.items()]
    entries = [
        _entry(source.dataset or "text", source.dataset or "held-out text", split, name, TEXT_METRICS[name], value)
        for name, value in metrics.items()
    ]
    return ResultTable(
        caption,
        markdown_table(("measure", "value"), rows),
        entries,
        is_text=True,
        subject=f"the {split} text",
        experts_per_token=metrics.get("experts_per_token"),
    )


def _task_table(report: Mapping[str, Any]) -> ResultTable:
    compute = report.get("compute") if isinstance(report.get("compute"), Mapping) else {}
    rows, entries = [], []
    for task, metrics in report["results"].items():
        cost = _task_cost(compute.get(task))
        for metric, value in metrics.items():
            if not is_number(value) or "_stderr" in metric:
                continue
            name, _, variant = metric.partition(",")
            label = name if variant in ("", "none") else f"{name} ({variant})"
            error = metrics.get(f"{name}_stderr{',' + variant if variant else ''}")
            shown = f"{value:.4g} ± {error:.2g}" if is_number(error) else f"{value:.4g}"
            rows.append((f"`{task}`", label, shown, *cost))
            entries.append(_entry(str(task), str(task), None, name, label, value))
        if (mean := _mean(compute.get(task), "continuation")) is not None:
            entries.append(_entry(str(task), str(task), None, "experts_per_token", "experts per token", mean))
    columns = (
        *("task", "metric", "value", "experts per token of the prompt", "of the continuation", "active parameters"),
    )
    kept = [index for index in range(len(columns)) if index < 3 or any(row[index] for row in rows)]
    markdown = markdown_table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    versions = report.get("versions")
    software = f" ({', '.join(f'{k} {v}' for k, v in versions.items())})" if isinstance(versions, Mapping) else ""
    return ResultTable(f"By `dynmoe evaluate --tasks`{software}:", markdown, entries, is_text=False)


def _task_cost(cost: object) -> tuple[str, str, str]:
    """Experts per token of prompt and continuation, and active parameters; empty where they are not known."""
    parts = [_mean(cost, part) for part in ("prompt", "continuation")]
    active = cost.get("active_parameters") if isinstance(cost, Mapping) else None
    means = ["" if mean is None else f"{mean:.3g}" for mean in parts]
    return (*means, f"{round(active):,}" if is_number(active) else "")


def _mean(cost: object, part: str) -> float | None:
    for key in ("experts_per_token", part, "mean"):
        cost = cost.get(key) if isinstance(cost, Mapping) else None
    return float(cost) if is_number(cost) else None


def _entry(kind: str, name: str, split: str | None, metric: str, label: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=TASK_TYPE,
        task_name=TASK_NAME,
        dataset_type=kind,
        dataset_name=name,
        dataset_split=split,
        metric_type=metric,
        metric_name=label,
        metric_value=round(value, 6),
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with its first column aligned left and all others right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
