"""Fine-tuning on tasks of GLUE: encoding, metrics, resuming, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

pytest.importorskip("evaluate")

from dynmoe_hf.model.methods import METHODS
from dynmoe_hf.training import finetune_glue
from dynmoe_hf.training.arguments import parse_arguments
from dynmoe_hf.training.finetune_glue import TASKS, GlueArguments, end_with_eos
from tests.training.finetuning import WORDS, call, quiet_datasets, results, save_checkpoint, save_rows

ROOT = Path(__file__).parents[2]
NEW_MODEL = (
    "--model={hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_experts: 4, max_position_embeddings: 64}"
)


def pairs(number: int, seed: int, labels: tuple[Any, Any] = (0, 1)) -> list[dict[str, Any]]:
    """The label says whether the second text begins with the word `yes`."""
    source = random.Random(seed)
    rows = []
    for _ in range(number):
        first, second = (" ".join(source.choices(WORDS[2:], k=source.randint(1, 6))) for _ in range(2))
        answer = source.randint(0, 1)
        rows.append({"sentence1": first, "sentence2": f"{WORDS[1 - answer]} {second}", "label": labels[answer]})
    return rows


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("glue")
    with quiet_datasets(folder / "cache"):
        save_checkpoint(folder / "base")
        save_rows(folder / "train.jsonl", pairs(120, seed=1))
        save_rows(folder / "validation.jsonl", pairs(30, seed=2))
        yield folder


def run(workplace: Path, output_dir: Path, *flags: Any, task: str = "rte", model: Any = None) -> int:
    given = {"model": f"--model={workplace / 'base'}" if model is None else model}
    files = ("--train_files", workplace / "train.jsonl", "--validation_files", workplace / "validation.jsonl")
    output = ("--output_dir", output_dir)
    return call(
        finetune_glue.finetune_glue,
        GlueArguments,
        given["model"],
        "--task",
        task,
        "--max_length",
        32,
        *files,
        *output,
        *flags,
    )


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    assert run(workplace, workplace / "trained", "--max_steps", 60, "--save_steps", 30) == 0
    return workplace / "trained"


def test_the_saved_model_has_the_reported_metrics(workplace: Path, trained: Path) -> None:
    """Asked one pair at a time; and through a pipeline, for which the tokenizer knows how texts are put together."""
    model = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rows, train_rows = pairs(30, seed=2), pairs(120, seed=1)
    eos = tokenizer.eos_token_id
    answers = []
    for row in rows:
        ids = [
            *(tokenizer(row["sentence1"], add_special_tokens=False)["input_ids"] + [eos]),
            *(tokenizer(row["sentence2"], add_special_tokens=False)["input_ids"] + [eos]),
        ]
        with torch.no_grad():
            answers.append(model(torch.tensor([ids])).logits[0].argmax().item())
    labels = [row["label"] for row in rows]
    metrics = results(trained)
    assert metrics["eval_accuracy"] == sum(map(int.__eq__, answers, labels)) / 30 > 0.8
    majority = int(sum(row["label"] for row in train_rows) > 60)
    assert metrics["eval_majority_accuracy"] == labels.count(majority) / 30
    assert 1 <= metrics["eval_experts_per_token"] <= 4
    assert "eval_perplexity" not in metrics

    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    found = classify([{"text": row["sentence1"], "text_pair": row["sentence2"]} for row in rows])
    assert [model.config.label2id[entry["label"]] for entry in found] == answers
    assert {entry["label"] for entry in found} <= set(TASKS["rte"].labels)


def test_texts_end_with_eos_and_the_longer_one_is_cut(workplace: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workplace / "base")
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("yes", "no the router sends")]
    end_with_eos(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    eos, length = loaded.eos_token_id, len(plain[0]) + 4
    batch = {"sentence1": ["yes"], "sentence2": ["no the router sends"], "sentence": ["no the router sends"]}
    batch["label"] = [1]
    for task, expected in (
        ("rte", [*plain[0], eos, *plain[1][:2], eos]),
        ("sst2", [*plain[1][: length - 1], eos]),
    ):
        encoded = finetune_glue._encode(batch, TASKS[task], loaded, length)
        assert encoded == {"input_ids": [expected], "attention_mask": [[1] * len(expected)], "labels": [1]}


def test_padding_is_that_of_the_tokenizer(workplace: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(workplace / "base")
    tokenizer.pad_token = None
    end_with_eos(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS"):
        end_with_eos(tokenizer)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(workplace: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "checkpoint-30", tmp_path / "checkpoint-30")
    flags = ("--max_steps", 60, "--save_steps", 30, "--resume_from_checkpoint", "true")
    assert run(workplace, tmp_path, *flags) == 0
    whole, parts = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert results(tmp_path)["eval_accuracy"] == results(trained)["eval_accuracy"]


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_learns_a_task(method: str, workplace: Path, tmp_path: Path) -> None:
    """A new model, with the tokenizer trained on the examples."""
    flags = ("--routing", method, "--vocab_size", 280, "--max_steps", 2, "--logging_steps", 1)
    assert run(workplace, tmp_path / "out", *flags, model=NEW_MODEL) == 0
    metrics = results(tmp_path / "out")
    assert all(value == value for value in metrics.values())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.routing["method"] == method and model.config.problem_type == "single_label_classification"


def test_the_seed_draws_head_and_examples(workplace: Path, tmp_path: Path) -> None:
    heads = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        flags = ("--max_steps", 1, "--learning_rate", 0, "--max_train_examples", 4, "--seed", seed)
        assert run(workplace, tmp_path / name, *flags) == 0
        heads[name] = load_file(tmp_path / name / "model.safetensors")["score.weight"]
    assert torch.equal(heads["a"], heads["b"]) and not torch.equal(heads["a"], heads["c"])
    examples = Dataset.from_dict({"label": list(range(50))})
    drawn = [
        finetune_glue._draw(examples, 10, parse_arguments(["--use_cpu", "--seed", seed])[2])["label"][:]
        for seed in ("0", "0", "1")
    ]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 10


def test_a_number_is_learned(workplace: Path, tmp_path: Path) -> None:
    for split, seed in (("train", 1), ("validation", 2)):
        save_rows(tmp_path / f"{split}.jsonl", pairs(80, seed, labels=(0.5, 4.25)))
    files = [word for split in ("train", "validation") for word in (f"--{split}_files", tmp_path / f"{split}.jsonl")]
    assert run(workplace, tmp_path / "out", *files, "--max_steps", 60, task="stsb") == 0
    metrics = results(tmp_path / "out")
    assert min(metrics["eval_pearson"], metrics["eval_spearmanr"]) > 0.7
    assert metrics["eval_majority_pearson"] == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


def test_both_validation_splits_of_mnli(workplace: Path, trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """From a checkpoint with a head for another number of classes, which is drawn anew."""
    rows = [
        {"premise": row["sentence1"], "hypothesis": row["sentence2"], "label": row["label"] * 2} for row in pairs(9, 3)
    ]
    names = ("train", "validation_matched", "validation_mismatched", "test_matched")
    hub = DatasetDict({name: Dataset.from_list(rows) for name in names})
    monkeypatch.setattr(finetune_glue, "load_dataset", lambda *name: {("nyu-mll/glue", "mnli"): hub}[name])
    flags = ("--task", "mnli", "--max_length", 32, "--max_steps", 1, "--output_dir", tmp_path / "out")
    assert call(finetune_glue.finetune_glue, GlueArguments, f"--model={trained}", *flags) == 0
    metrics = results(tmp_path / "out")
    assert {"eval_matched_accuracy", "eval_mismatched_accuracy", "eval_matched_experts_per_token"} < set(metrics)
    assert load_file(tmp_path / "out" / "model.safetensors")["score.weight"].shape[0] == 3


ROWS = pairs(4, seed=0)
REFUSED = {
    "no task": (["--task="], None, "no value|task"),
    "unknown task": (["--task", "mrcp"], None, "Unknown task of GLUE: 'mrcp'. Did you mean 'mrpc'?"),
    "one file": (["--task", "rte"], "one", "train_files and validation_files belong together"),
    "missing column": (["--task", "qnli"], None, "no column 'question', only: sentence1, sentence2, label"),
    "test labels": ([], [{**row, "label": -1} for row in ROWS], "label -1, which must be one of 0 ... 1"),
    "names for labels": ([], [{**row, "label": "yes"} for row in ROWS], "label 'yes', which must be one of 0 ... 1"),
    "fractions": ([], [{**row, "label": 0.5} for row in ROWS], "label 0.5, which must be one of 0 ... 1"),
    "no label": (["--task", "stsb"], [*ROWS, {**ROWS[0], "label": None}], "label None, which must be a finite number"),
    "no text": ([], [*ROWS, {**ROWS[0], "sentence2": None}], "column 'sentence2' of the train split must hold text"),
    "too long": (["--max_length", "65"], None, "max_length is 65, but the model's max_position_embeddings is 64"),
    "too short": (["--max_length", "3"], None, "max_length is 3, but"),
    "no examples": (["--max_train_examples", "0"], None, "max_train_examples is 0, but"),
    "no such file": (["--train_files", "absent.jsonl"], None, "no text file found at 'absent.jsonl'"),
    "no such key": (["--block_size", "32"], None, "Unknown argument 'block_size'"),
    "no model": (["--model=absent"], None, "couldn't connect"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_costs_one_line(name: str, workplace: Path, tmp_path: Path, capsys: Any) -> None:
    flags, rows, message = REFUSED[name]
    if rows == "one":
        files = ["--train_files", workplace / "train.jsonl"]
        flags = [f"--model={workplace / 'base'}", *flags, *files, "--output_dir", tmp_path / "out"]
        assert call(finetune_glue.finetune_glue, GlueArguments, *flags) == 2
    else:
        if rows is not None:
            flags = [*flags, "--train_files", save_rows(tmp_path / "rows.jsonl", rows)]
        assert run(workplace, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("finetune_glue.py: ")
    assert re.search(message if name == "no task" else re.escape(message), error)
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(workplace: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*"))
    assert run(workplace, trained) == 2
    assert "holds an earlier run: --resume_from_checkpoint true goes on with it" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*")) == before


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_and_table_of_the_repository(tmp_path: Path) -> None:
    path = str(ROOT / "configs/finetune/glue.yaml")
    _, glue_args, training_args = parse_arguments(["--use_cpu"], path, GlueArguments)
    assert (glue_args.task, training_args.learning_rate) == ("rte", 5e-4)
    for method, accuracy in (("top_k", (0.5, 0.7)), ("da_moe", (0.25, 0.25))):
        for seed, value in enumerate(accuracy):
            (tmp_path / method / "rte" / str(seed)).mkdir(parents=True)
            metrics = {"eval_accuracy": value, "eval_majority_accuracy": 0.5, "eval_experts_per_token": 2 + seed}
            save_rows(tmp_path / method / "rte" / str(seed) / "all_results.json", [metrics])
    table = script("glue_table")
    assert table.table(table.read(tmp_path)).splitlines()[2:] == [
        "| rte | accuracy | 50.0 | 60.0 ± 14.1 | 2.50 | 25.0 ± 0.0 | 2.50 |"
    ]


def test_the_comparison_runs_what_is_not_there_yet(tmp_path: Path) -> None:
    """With commands that only say how they were called: every method, task and seed once, then the table."""
    for name in ("dynmoe", "python"):
        (tmp_path / name).write_text('#!/bin/sh\necho "${0##*/}|$*"\n')
        (tmp_path / name).chmod(0o755)
    for split in ("mrpc/train", "mrpc/test", "rte/train", "rte/validation"):
        (tmp_path / split).parent.mkdir(exist_ok=True)
        (tmp_path / f"{split}.jsonl").touch()
    there = tmp_path / "out/da_moe/rte/1"
    there.mkdir(parents=True)
    save_rows(there / "all_results.json", [{}])
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GLUE": str(tmp_path), "CORPUS": "a b.txt"}
    environment |= {"TASKS": "mrpc rte", "SEEDS": "0 1"}
    command = [
        "bash",
        str(ROOT / "scripts/glue_da_moe_vs_top_k.sh"),
        str(tmp_path / "out"),
        "--max_train_examples",
        "5",
    ]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    models = [line for line in printed if line.startswith("dynmoe|train ")]
    assert len(models) == 2 and all("--dataset a b.txt --routing {method: " in line for line in models)
    assert len(printed) == 2 + 7 + 1 and "glue_table.py" in printed[-1]
    runs = [line for line in printed if "finetune_glue.py" in line]
    assert sum("/da_moe/rte/" in line for line in runs) == 1 and sum("/top_k/mrpc/" in line for line in runs) == 2
    assert all(line.endswith(" --max_train_examples 5") for line in runs)
    assert all(("test.jsonl" in line) == (" --task mrpc " in line) for line in runs)
