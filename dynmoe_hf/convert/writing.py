"""Writing a checkpoint one shard at a time, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from dynmoe_hf.errors import UserError
from dynmoe_hf.model.checkpoints import INDEX

from .sources import COMPANIONS, Checkpoint


class Job(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return self.shape.numel() * self.dtype.itemsize


@contextlib.contextmanager
def new_folder(target: str | os.PathLike, source: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to write into, which takes its name at the end, and is deleted if anything goes wrong before.

    Raises:
        ValueError: before any work: the target is there and `overwrite` is not given, or it is no model folder; source
            and target are one, or one in the other.
        UserError: what was written does not fit on the disk, or may not stand there.
    """
    target = Path(os.path.abspath(os.path.expanduser(os.fspath(target))))
    own, other = target.resolve(), source.resolve()
    if own == other or own in other.parents or other in own.parents:
        raise ValueError(f"target {str(target)!r} and source {str(source)!r} must be two folders, none in the other.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{str(target)!r} is a file or a link.")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{str(target)!r} exists; --overwrite replaces it.")
        if not (target / "config.json").is_file():
            raise ValueError(f"{str(target)!r} has no config.json: only the folder of a model is overwritten.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {str(target)!r}: {error.strerror}.") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())  # mkdtemp lets nobody else read it
        _flush(folder)
        _replace(target, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(target)!r} could not be written, and nothing is left of it: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_weights(folder: Path, jobs: list[Job], max_shard_size: int | str, source: Checkpoint) -> int:
    """Write model.safetensors, or shards and their index; returns the number of files.

    One shard at a time is in memory. A tensor larger than a shard has one of its own.
    """
    by_name = {job.name: job for job in jobs}
    plan = split_state_dict_into_shards_factory(
        {job.name: job for job in jobs},
        get_storage_size=lambda job: job.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with tqdm(total=len(jobs), desc="Converting", unit="tensor") as progress:
        for file_name, names in plan.filename_to_tensors.items():
            tensors = {}
            for name in names:
                tensor = by_name[name].make().to(by_name[name].dtype).contiguous()
                if tensor.shape != by_name[name].shape:
                    raise ValueError(f"{name} became {tuple(tensor.shape)} instead of {tuple(by_name[name].shape)}.")
                tensors[name] = tensor
                progress.update()
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            del tensors, tensor
            source.close()
    if plan.is_sharded:
        parameters = sum(job.shape.numel() for job in jobs)
        index = {"metadata": {"total_parameters": parameters, **plan.metadata}, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return len(plan.filename_to_tensors)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer and the settings of generation."""
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
            else:
                shutil.copytree(path, folder / path.name)


def _replace(target: Path, folder: Path) -> None:
    """Give the folder its name. What stood there before goes away last."""
    if not target.exists():
        folder.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Have everything on the disk before the folder takes its name."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
