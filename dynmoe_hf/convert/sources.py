"""Reading a checkpoint one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynmoe_hf.model.checkpoints import INDEX, read_object, shard_names
from dynmoe_hf.model.routing import shown

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What stands beside weights and config.json and belongs to the model whatever its format.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: torch.Size
    dtype: torch.dtype

    @property
    def meta(self) -> Tensor:
        """The tensor without its values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Checkpoint:
    """A folder with a config.json and weights, of which one file is open at a time.

    Args:
        name_or_path: a local folder, or the name of a repository of the Hub, which is downloaded into the cache.
        allow_pickle: also read pytorch_model.bin, with `weights_only=True`, where there are no safetensors.

    Raises:
        ValueError: there is no such folder; config.json or an index is broken; a file is missing, truncated or of a
            dtype that no model has; only pickled weights are there and `allow_pickle` is not given.
    """

    def __init__(self, name_or_path: str | os.PathLike, allow_pickle: bool = False) -> None:
        self.folder = _local_folder(name_or_path, allow_pickle)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"the folder {str(self.folder)!r} has no config.json, so it holds no model.")
        self.config: dict[str, Any] = read_object(self.folder / "config.json")
        self.files = _weight_files(self.folder, allow_pickle)
        self._open_file: Path | None = None
        self._reader: Any = None
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in self._list(file):
                if name in self.tensors:
                    raise ValueError(f"{name} is in two files: {self.tensors[name].file.name} and {file.name}.")
                self.tensors[name] = stored

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file of weights."""
        return max(file.stat().st_size for file in self.files)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or one index of its first dimension. It may share memory with the file: do not change it."""
        self._open(self.tensors[name].file)
        if isinstance(self._reader, Mapping):
            return self._reader[name] if index is None else self._reader[name][index]
        return self._reader.get_tensor(name) if index is None else self._reader.get_slice(name)[index]

    def close(self) -> None:
        """Let go of the file that is open, and of the memory that its pages take."""
        self._open_file = self._reader = None

    def _open(self, file: Path) -> None:
        if self._open_file == file:
            return
        self.close()
        try:
            if file.suffix == ".safetensors":
                self._reader = safe_open(file, framework="pt")
            else:
                self._reader = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file.name} is truncated or corrupt: {str(error).splitlines()[0]}.") from error
        except Exception as error:  # pickle raises errors of its own
            raise ValueError(f"{file.name} holds more than tensors, and is not read.") from error
        self._open_file = file

    def _list(self, file: Path) -> Iterator[tuple[str, Stored]]:
        self._open(file)
        if isinstance(self._reader, Mapping):
            for name, tensor in self._reader.items():
                if not isinstance(tensor, Tensor):
                    raise ValueError(f"{file.name} holds more than tensors: {shown(name)}.")
                yield name, Stored(file, tensor.shape, tensor.dtype)
            return
        for name in self._reader.keys():
            header = self._reader.get_slice(name)
            if header.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{name} in {file.name} is stored as {header.get_dtype()}: quantised weights cannot be converted."
                )
            yield name, Stored(file, torch.Size(header.get_shape()), DTYPES[header.get_dtype()])


def _local_folder(name_or_path: str | os.PathLike, allow_pickle: bool) -> Path:
    path = Path(os.path.expanduser(os.fspath(name_or_path)))
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or str(name_or_path).startswith("."):
        raise ValueError(f"there is no model folder at {str(name_or_path)!r}.")
    patterns = ["config.json", "*.safetensors", INDEX, *COMPANIONS]
    if allow_pickle:
        patterns += ["pytorch_model*.bin", PICKLE_INDEX]
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{str(name_or_path)!r} is no folder, and cannot be had from the Hub: {reason}") from error


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif (folder / INDEX).is_file():
        names = shard_names(folder / INDEX)
    elif not any(folder.glob("pytorch_model*.bin")):
        raise ValueError(f"the folder {str(folder)!r} has neither model.safetensors nor {INDEX}.")
    elif not allow_pickle:
        raise ValueError(
            f"the weights in {str(folder)!r} are pickled, and a pickle can hold code: --allow-pickle reads it all the "
            "same, with the loader of torch that takes tensors only."
        )
    elif (folder / PICKLE).is_file():
        names = [PICKLE]
    else:
        names = _pickle_names(folder)
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"the folder {str(folder)!r} has no {name}, which its index names.")
    return [folder / name for name in names]


def _pickle_names(folder: Path) -> list[str]:
    weight_map = read_object(folder / PICKLE_INDEX).get("weight_map") if (folder / PICKLE_INDEX).is_file() else None
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(name, str) or os.path.basename(name) != name for name in names):
        raise ValueError(f"{PICKLE_INDEX} is missing or corrupt, or names files of another folder.")
    return sorted(names)
