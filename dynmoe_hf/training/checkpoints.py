"""Checkpoints of runs that were killed: which one is whole, and a Trainer that keeps the older one until then."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dynmoe_hf.errors import UserError

STATE_FILE = "trainer_state.json"
# What a run cannot go on without; of several patterns, one will do. DeepSpeed has a folder for most of it.
PARTS = {
    STATE_FILE: (STATE_FILE,),
    "configuration": ("config.json", "adapter_config.json"),
    "tokenizer": ("tokenizer*",),
    "weights": ("*model*.safetensors", "pytorch_model*", "global_step*"),
    "state of the optimizer": ("optimizer*", "global_step*"),
    "state of the learning rate": ("scheduler.pt", "global_step*"),
    "random state": ("rng_state*.pth",),
}


def fault(checkpoint: str | Path) -> str | None:
    """Why no run can go on from this folder; None if all that it takes is there and no file was cut off.

    Only the ends and indices of large files are read: what changed inside of one is not found.
    """
    folder = Path(checkpoint)
    for part, patterns in PARTS.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"it has no {part}"
    for path in sorted(folder.iterdir()):
        try:
            missing = _missing_shards(path)
        except (OSError, ValueError, LookupError, zipfile.BadZipFile, SafetensorError):
            return f"{path.name} is damaged"
        if missing:
            return f"it has no {missing[0]}"
    return None


def _missing_shards(path: Path) -> list[str]:
    """Read what shows that a file is complete; returns what an index names and is not there."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            return []
    if path.suffix in (".pt", ".pth", ".bin") and path.is_file():
        zipfile.ZipFile(path).close()
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name.endswith(".index.json"):
            return sorted(name for name in set(content["weight_map"].values()) if not (path.parent / name).exists())
    return []


def last_whole_checkpoint(folder: str | Path) -> tuple[str | None, dict[str, str]]:
    """The whole checkpoint of the highest step, if any, and the fault of each one with a higher step, by its path."""
    steps = {}
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and re.fullmatch(r"\d+", step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")):
            steps[int(step)] = str(path)
    faults = {}
    for step in sorted(steps, reverse=True):
        reason = fault(steps[step])
        if reason is None:
            return steps[step], faults
        faults[steps[step]] = reason
    return None, faults


@contextlib.contextmanager
def writing(target: Path, output_dir: str | Path) -> Iterator[None]:
    """A target that cannot be written ends the command with a sentence that names the last whole checkpoint.

    Raises:
        UserError: for a full disk, missing permissions and the like.
    """
    try:
        yield
    except Exception as error:
        # torch raises a plain RuntimeError where a write fails, and tokenizers a plain Exception.
        if not isinstance(error, OSError | SafetensorError) and type(error) not in (RuntimeError, Exception):
            raise
        checkpoint, _ = last_whole_checkpoint(output_dir)
        kept = f"the last whole checkpoint is {checkpoint!r}" if checkpoint else "there is no whole checkpoint yet"
        raise UserError(f"{str(target)!r} could not be written: {_reason(error, output_dir)}; {kept}.") from error


def _reason(error: Exception, folder: str | Path) -> str:
    with contextlib.suppress(OSError):
        if shutil.disk_usage(folder).free < 2**20:
            return "no space left on the device"  # torch only says that a position in the file is unexpected
    return " ".join(str(error).split())


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoint is whole as soon as its `trainer_state.json` is.

    The Trainer of transformers writes this file after all others, and deletes older checkpoints after that. Added is
    that the files of all processes are on the disk before it, that it does not stay behind from an older checkpoint of
    the same step, and that a run which was stopped after its last step does not take another one.
    """

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where no step is left: the Trainer takes one more if it resumes from its last one amid an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial=trial))
        checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing(checkpoint, self.args.output_dir):
            if self.args.should_save:
                (checkpoint / STATE_FILE).unlink(missing_ok=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last thing that every process writes."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            _flush(Path(output_dir))


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
