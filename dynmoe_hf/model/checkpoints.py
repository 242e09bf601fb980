# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""What must hold of a checkpoint before and after transformers loads it."""

import json
import os
from typing import Any

from torch import nn

INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 2**26
ROUTERS = {"gate", "selector", "shared_scorers", "controller"}


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds none, or one too large or nested too deep to read. OSError if there is no such file.
    """
    if os.path.getsize(path) > MAX_JSON_BYTES:
        raise ValueError(f"{os.fspath(path)!r} is larger than {MAX_JSON_BYTES:,} bytes.")
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)!r} is truncated or corrupt, not a valid JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)!r} holds no JSON object.")
    return content


def shard_names(path: str | os.PathLike) -> list[str]:
    """The files that an index of weights names.

    Raises:
        ValueError: it names anything but safetensors beside itself. transformers would read a pickle, or a file of
            another folder.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{os.fspath(path)!r} is corrupt: it has no weight_map.")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".safetensors"):
            raise ValueError(f"{os.fspath(path)!r} must name safetensors files beside it, got {str(name)[:100]!r}.")
    return sorted(set(names))


def refuse_missing(model: nn.Module, missing: list[str]) -> None:
    """Refuse a loaded model whose checkpoint lacks weights other than those of a head or a router.

    Raises:
        ValueError: naming the first of them.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    keys = sorted(key for key in missing if key.startswith(prefix) and ROUTERS.isdisjoint(key.split(".")))
    if keys:
        more = f" and {len(keys) - 1} more weights" if keys[1:] else ""
        raise ValueError(
            f"The checkpoint lacks {keys[0]}{more} of the model that its configuration describes; "
            "ignore_mismatched_sizes=True starts them from random numbers."
        )
