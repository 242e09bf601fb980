"""Kill `dynmoe train` at random moments, resume it, and compare its end bit by bit with that of a run left alone.

    python scripts/kill_and_resume.py --trials 20 --seed 0

Every trial starts a small run, sends it SIGKILL, and lets `--resume_from_checkpoint true` finish it. Half of the kills
come at any moment of the training, the others while a checkpoint is written. Compared are all tensors of the model, the
controllers among them, and the state of the optimizer, of the learning rate and of all random generators. A trial fails
if one bit differs, or if a checkpoint that was finished before the kill cannot be resumed from. Exit code 1 if one did.
With `--streaming` the text is a stream, which two workers read.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dynmoe_hf.training.checkpoints import STATE_FILE, last_whole_checkpoint
from dynmoe_hf.training.tokenizer import train_tokenizer

SETTINGS = {
    "model": {
        "hidden_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 8,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
    },
    "routing": {"method": "dtop_p", "controller": {"target": 2}, "losses": {"load_balance": 0.01, "dynamic": 0.001}},
    "vocab_size": 400,
    "block_size": 64,
    "max_steps": 30,
    "save_steps": 3,
    "save_total_limit": 2,
    "logging_steps": 10,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
STREAMING = {"streaming": True, "shuffle_buffer": 16, "validation_documents": 10, "dataloader_num_workers": 2}


def write_run(folder: Path, streaming: bool) -> Path:
    """Documents of random words and a configuration; JSON is YAML."""
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefgh", k=words.randint(2, 7))) for _ in range(300)]
    documents = [{"text": " ".join(words.choices(vocabulary, k=words.randint(30, 120)))} for _ in range(120)]
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    settings = SETTINGS | {"dataset": str(folder / "documents.jsonl")}
    if streaming:
        tokenizer = train_tokenizer([document["text"] for document in documents], SETTINGS["vocab_size"])
        tokenizer.save_pretrained(folder / "tokenizer")
        settings |= STREAMING | {"tokenizer": str(folder / "tokenizer")}
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings))
    return config


def start(config: Path, output_dir: Path, *flags: str) -> subprocess.Popen:
    """A run of its own, whose words go into a file beside its folder."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--config", str(config)]
    with output_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, "--output_dir", str(output_dir), *flags], stdout=log, stderr=log)


def wait_for(process: subprocess.Popen, path: Path) -> None:
    """Until the path is there or the process has ended."""
    while process.poll() is None and not path.exists():
        time.sleep(0.0005)


def finish(process: subprocess.Popen, output_dir: Path) -> None:
    if process.wait() != 0:
        raise RuntimeError(f"The run failed:\n{output_dir.with_suffix('.log').read_text()[-2000:]}")


def finished(output_dir: Path) -> int:
    """The last step whose checkpoint is complete; 0 if there is none."""
    return max((step(path.parent) for path in output_dir.glob(f"checkpoint-*/{STATE_FILE}") if parses(path)), default=0)


def half_written(output_dir: Path) -> list[int]:
    return sorted(step(path) for path in output_dir.glob("checkpoint-*") if not parses(path / STATE_FILE))


def step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def parses(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def end_state(output_dir: Path) -> dict[str, Any]:
    """All that a run ends with and could go on with."""
    checkpoint = output_dir / f"checkpoint-{SETTINGS['max_steps']}"
    state = {
        name: torch.load(checkpoint / name, weights_only=False)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    }
    for place in (output_dir, checkpoint):
        state[place.name if place is checkpoint else "model"] = load_file(place / "model.safetensors")
    return state


def seconds_of_a_write(output_dir: Path) -> float:
    """From the first file of its last checkpoint to the last one."""
    checkpoint = output_dir / f"checkpoint-{SETTINGS['max_steps']}"
    return (checkpoint / STATE_FILE).stat().st_mtime - (checkpoint / "config.json").stat().st_mtime


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The places where two nested structures are not the same bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor | np.ndarray) and type(a) is type(b):
        a, b = np.asarray(a), np.asarray(b)
        same = a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    else:
        same = repr(a) == repr(b)
    return [] if same else [path]


def kill(
    config: Path, output_dir: Path, chance: random.Random, training_seconds: float, write_seconds: float | None
) -> tuple[str, int]:
    """Start a run and kill it, in a write if its seconds are given; returns when, and the last step finished before."""
    process = start(config, output_dir)
    wait_for(process, output_dir / "train_config.yaml")  # written when the training begins
    began, at = time.perf_counter(), "any moment"
    if write_seconds is None:
        time.sleep(chance.uniform(0, training_seconds))
    else:
        number = SETTINGS["save_steps"] * chance.randint(1, SETTINGS["max_steps"] // SETTINGS["save_steps"])
        at = f"writing {number}"
        wait_for(process, output_dir / f"checkpoint-{number}")
        time.sleep(chance.uniform(0, write_seconds))
    last = finished(output_dir)
    process.kill()
    process.wait()
    return f"{time.perf_counter() - began:.2f} s, {at}", last


def main() -> int:
    """Run the trials and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streaming", action="store_true")
    args = parser.parse_args()
    chance = random.Random(args.seed)
    halves = different = lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, alone = write_run(folder, args.streaming), folder / "alone"
        process = start(config, alone)
        wait_for(process, alone / "train_config.yaml")
        began = time.perf_counter()
        wait_for(process, alone / "all_results.json")
        training_seconds = time.perf_counter() - began
        finish(process, alone)
        expected, write_seconds = end_state(alone), seconds_of_a_write(alone)
        print(f"Left alone, a run takes {training_seconds:.1f} s from its first step, a write {write_seconds:.3f} s.")
        row = "{:<7}{:<24}{:<10}{:<14}{:<14}{}".format
        print(row("trial", "killed after", "finished", "half-written", "resumed from", "differences"))
        for trial in range(1, args.trials + 1):
            output_dir = folder / f"trial_{trial}"
            in_write = write_seconds if trial % 2 == 0 else None
            moment, before = kill(config, output_dir, chance, training_seconds, in_write)
            half, checkpoint = half_written(output_dir), last_whole_checkpoint(output_dir)[0]
            resumed = 0 if checkpoint is None else step(Path(checkpoint))
            flags = ("--resume_from_checkpoint", "true") if checkpoint else ("--overwrite_output_dir",)
            finish(start(config, output_dir, *flags), output_dir)
            found = differences(expected, end_state(output_dir))
            halves, different, lost = halves + bool(half), different + bool(found), lost + (resumed < before)
            print(row(trial, moment, before, str(half or "-"), resumed or "start", found or "none"), flush=True)
            shutil.rmtree(output_dir)
    print(
        f"{args.trials} trials, {halves} with a half-written checkpoint: {different} with a difference, "
        f"{lost} that lost a finished checkpoint"
    )
    return int(different + lost > 0)


if __name__ == "__main__":
    sys.exit(main())
