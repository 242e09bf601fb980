"""Bytes of a training step: what the forward pass keeps for the backward pass, and the peak of both."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

# Otherwise the profiler announces every start and stop on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def kept_bytes(forward: Callable[[], object], module: nn.Module) -> int:
    """Bytes of the storages that the forward pass saves for the backward pass, each once, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        del output
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def peak_bytes(step: Callable[[], object]) -> int:
    """The highest sum of what torch's allocator has handed out and not got back since the step began.

    Parameters and inputs exist before; gradients are among it, and have to be freed before the step. A library's own
    working memory goes past the allocator.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak
