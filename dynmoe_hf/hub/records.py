"""What a training folder and the reports of `dynmoe evaluate` say about a model, for its card.

What they do not say is None or missing, and the card leaves it out. Paths of the machine that trained stay behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynmoe_hf.model.checkpoints import read_object
from dynmoe_hf.training.arguments import read_settings

TRAIN_CONFIG, TRAINER_STATE = "train_config.yaml", "trainer_state.json"
# The first that is there has the figures of the last evaluation.
METRICS = ("all_results.json", "eval_results.json")
BUILT_IN_CORPUS = "python-stdlib"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VERSIONS = re.compile(r"# .*; written by (.*)")
_FILE_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".gz", ".xz", ".bz2", ".zst")


@dataclass(frozen=True)
class TextSource:
    """Where text came from.

    Args:
        dataset: Hub id, or `python-stdlib`; None for local files.
        words: what a reader is told.
    """

    dataset: str | None
    words: str


@dataclass(frozen=True)
class TrainingRecord:
    """How a model was trained.

    Args:
        settings: the arguments of `dynmoe train` that are not defaults.
        versions: of the packages that trained, in words.
        steps: optimizer steps.
        global_batch: sequences in one of them, over all processes.
        tokens: that were trained on, in this run.
        epochs: passes over the text.
        metrics: of the last evaluation, with the names of `dynmoe train`: `eval_bits_per_byte` ...
        text: what it was trained on.
        base_model: Hub id of the model that training began from.
        from_local_checkpoint: whether it began from a folder.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: str | None = None
    steps: int | None = None
    global_batch: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: TextSource | None = None
    base_model: str | None = None
    from_local_checkpoint: bool = False


def read_training(folder: Path) -> TrainingRecord:
    """Read what a folder of `dynmoe train`, or of any Trainer, says about the training; as little as there is.

    Raises:
        ValueError: for a file that is there and cannot be read.
    """
    settings, versions = {}, None
    if (folder / TRAIN_CONFIG).is_file():
        settings = read_settings(str(folder / TRAIN_CONFIG))
        first_line = (folder / TRAIN_CONFIG).read_text(encoding="utf-8").partition("\n")[0]
        versions = match[1] if (match := _VERSIONS.fullmatch(first_line)) else None
    state = _read_if_there(folder / TRAINER_STATE)
    log = [entry for entry in state.get("log_history") or [] if isinstance(entry, Mapping)]
    metrics = next((read_object(folder / name) for name in METRICS if (folder / name).is_file()), None)
    if metrics is None:
        metrics = next((entry for entry in reversed(log) if "eval_lm_loss" in entry), {})
    steps, global_batch = _count(state, "global_step"), _global_batch(state, settings, log)
    tokens, block_size = _count(state, "num_input_tokens_seen"), _count(settings, "block_size")
    if tokens is None and steps and global_batch and block_size:
        tokens = steps * global_batch * block_size
    base = settings.get("model") if isinstance(settings.get("model"), str) else None
    base_model = base if base and _is_hub_id(base, folder) else None
    return TrainingRecord(
        settings=settings,
        versions=versions,
        steps=steps,
        global_batch=global_batch,
        tokens=tokens,
        epochs=_positive(state, "epoch"),
        metrics={name: value for name, value in metrics.items() if is_number(value)},
        text=text_source(settings["dataset"], folder) if "dataset" in settings else None,
        base_model=base_model,
        from_local_checkpoint=base is not None and base_model is None,
    )


def read_evaluation(path: Path, folder: Path, routing: Mapping[str, Any]) -> dict[str, Any]:
    """A report of `dynmoe evaluate --output`, over tasks (`results`) or over text (`bits_per_byte`).

    Args:
        folder: of the model that is published.
        routing: of that model; a report on another one is not about it.

    Returns:
        The report, its `dataset` as a `TextSource`.

    Raises:
        ValueError: it is no such report, or one on other routing. OSError if there is no such file.
    """
    report = read_object(path)
    tasks = report.get("results")
    are_tasks = isinstance(tasks, Mapping) and bool(tasks) and all(isinstance(each, Mapping) for each in tasks.values())
    if not are_tasks and not is_number(report.get("bits_per_byte")):
        raise ValueError(f"{str(path)!r} is no report of `dynmoe evaluate`: it has no results and no bits_per_byte.")
    if report.get("routing", routing) != routing:
        raise ValueError(f"{str(path)!r} reports on another routing than that of the model; evaluate the model itself.")
    return report | {"dataset": text_source(report.get("dataset", []), folder)}


def text_source(sources: object, folder: Path) -> TextSource:
    """What a `dataset` argument names; of local files only their own names.

    Args:
        sources: a name, a path, or a list of them.
        folder: of the model.
    """
    sources = [str(source) for source in (sources if isinstance(sources, list) else [sources])]
    if sources == [BUILT_IN_CORPUS]:
        return TextSource(BUILT_IN_CORPUS, "the standard library of Python: its source code and its documentation")
    if len(sources) == 1 and _is_hub_id(sources[0], folder):
        return TextSource(sources[0], f"[{sources[0]}](https://huggingface.co/datasets/{sources[0]})")
    return TextSource(None, ", ".join(f"`{Path(source).name}`" for source in sources))


def is_number(value: object) -> bool:
    """Whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _positive(source: Mapping[str, Any], name: str) -> float | None:
    """A number above 0; the Trainer writes 0 for what it has not counted."""
    value = source.get(name)
    return value if is_number(value) and value > 0 else None


def _count(source: Mapping[str, Any], name: str) -> int | None:
    value = _positive(source, name)
    return None if value is None else int(value)


def _global_batch(state: Mapping[str, Any], settings: Mapping[str, Any], log: list[Mapping[str, Any]]) -> int | None:
    """Sequences in an optimizer step, over all processes: how many those were, only the speed in the last log tells."""
    batch, max_steps = _count(state, "train_batch_size"), _count(state, "max_steps")
    last = next((entry for entry in reversed(log) if "train_samples_per_second" in entry), {})
    rate, seconds = _positive(last, "train_samples_per_second"), _positive(last, "train_runtime")
    if not (batch and max_steps and rate and seconds):
        return None
    batch *= _count(settings, "gradient_accumulation_steps") or 1
    return batch * round(rate * seconds / (batch * max_steps)) or None


def _is_hub_id(name: str, folder: Path) -> bool:
    """Whether this is `organisation/name`, and no path seen from here or from where the model may have been trained."""
    if not _HUB_ID.fullmatch(name) or name.lower().endswith(_FILE_SUFFIXES):
        return False
    return not any((place / name).exists() for place in (Path(), *folder.absolute().parents))
