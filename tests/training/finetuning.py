"""A small checkpoint with its tokenizer, and command lines of fine-tuning in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest

from dynmoe_hf.cli import finetune
from dynmoe_hf.training.tokenizer import train_tokenizer
from tests.tiny import tiny_model

WORDS = "yes no the router sends every token to as many experts as it needs".split()
FLAGS = "--use_cpu true --disable_tqdm true --per_device_train_batch_size 4 --learning_rate 1e-2".split()


@contextmanager
def quiet_datasets(cache: Path) -> Iterator[None]:
    """No progress bars, and no cache of other runs."""
    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
        yield
    if were_on:
        datasets.enable_progress_bars()


def save_checkpoint(folder: Path, routing: Any = "top_p") -> Path:
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=300)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "mlp_layer_types": None, "num_experts": 4}
    tiny_model(routing, **sizes, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def call(job: Callable[..., Any], data_class: type, *flags: Any) -> int:
    return finetune.main(job, data_class, [*FLAGS, *map(str, flags)])


def results(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())
