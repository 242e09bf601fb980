"""The results file: figures, and all that is needed to read and remake them."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import dynmoe_hf
from dynmoe_hf.errors import UserError

from .contest import Result
from .settings import Settings


def machine() -> dict[str, Any]:
    """What the figures depend on; the GPUs are those that torch could use."""
    return {
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(results: Sequence[Result], settings: Settings, command: str, date: datetime.datetime) -> dict[str, Any]:
    """All of it, ready for `json.dumps`."""
    return {
        "command": command,
        "date": date.isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dynmoe_hf": dynmoe_hf.__version__,
        },
        "settings": dataclasses.asdict(settings),
        "results": [dataclasses.asdict(result) for result in results],
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def check_output(paths: Sequence[Path], overwrite: bool) -> None:
    """Refuse before any work what would be lost.

    Raises:
        UserError: for a file that exists, or cannot be written.
    """
    for path in paths:
        if path.is_dir():
            raise UserError(f"{str(path)!r} is a folder.")
        if path.exists() and not overwrite:
            raise UserError(f"{str(path)!r} exists; --overwrite replaces it.")
