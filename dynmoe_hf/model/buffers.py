# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""State that must not lose digits when a model is cast."""

from collections.abc import Callable
from typing import Any

from torch import nn


class KeepsBufferDtype(nn.Module):
    """A module whose own buffers keep their dtype under `model.half()`, `.bfloat16()` and `.to(dtype)`.

    A threshold or an integral in bfloat16 would no longer move by small steps, and rotary frequencies would turn
    distant positions into others.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self
