"""Tensors that other programs have computed. Where each file is from: `tests/vectors/README.md`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Module

FOLDER = Path(__file__).parent / "vectors"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LOWEST = torch.finfo(torch.float32).min


class Vectors(dict[str, Tensor]):
    """The tensors of one file by name, and the official configuration from its metadata."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            super().__init__({key: file.get_tensor(key) for key in file.keys()})
            self.official: dict[str, Any] = json.loads(file.metadata()["json"]).get("config", {})

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.items() if key.startswith(prefix)}

    def layer(self, layer: int, name: str) -> Tensor:
        """A recorded activation, its B and S flattened to T."""
        return self[f"act.layers.{layer}.{name}"].flatten(0, 1)

    @property
    def real(self) -> Tensor:
        return self["in.attention_mask"].bool()

    @property
    def inputs(self) -> dict[str, Tensor]:
        batch_size, sequence_length = self["in.input_ids"].shape
        # The official code numbered every row from 0, the left-padded one too.
        position_ids = torch.arange(sequence_length).expand(batch_size, -1)
        return {"input_ids": self["in.input_ids"], "position_ids": position_ids}

    @property
    def official_mask(self) -> Tensor:
        """(B, 1, S, S), the causal and the padding mask of the official code, added up. Being 4-D, it lets our padding
        be routed like any token, as there."""
        causal = torch.full((self.real.shape[1],) * 2, LOWEST).triu(1)
        padding = torch.zeros(self.real.shape).masked_fill(~self.real, LOWEST)
        return causal + padding[:, None, None, :]


@cache
def vectors(name: str) -> Vectors:
    return Vectors(name)


def compare_prefill_and_one_cached_step(model: Module, recorded: Vectors) -> None:
    """Logits of the first six positions with a cache, then of position seven alone."""

    def part(start: int, end: int, cache: Any) -> Any:
        inputs = {key: value[:, start:end] for key, value in recorded.inputs.items()}
        seen = recorded["in.attention_mask"][:, :end]
        return model(**inputs, attention_mask=seen, past_key_values=cache, use_cache=True)

    prefill = part(0, 6, None)
    step = part(6, 7, prefill.past_key_values)
    real = recorded.real[:, :6]
    torch.testing.assert_close(prefill.logits[real], recorded["out.prefill6_logits"][real], **CLOSE)
    torch.testing.assert_close(step.logits, recorded["out.step7_cached_logits"], **CLOSE)
