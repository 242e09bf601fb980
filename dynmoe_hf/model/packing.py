# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Copies of the experts' weights in the layout that a CPU multiplies a few rows with fastest, for generation.

oneDNN reorders a bfloat16 weight before every product, which for a few rows takes longer than the product. A packed
copy takes as much memory as the weight, so it is made on request only, and that of an expert at its first use.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .products import ROWS_TO_PACK, pack, packing_pays
from .quantized import is_quantized


class ExpertPacking:
    """Mixin of the models: pack the experts' weights, and free the copies again."""

    def pack_experts(self) -> bool:
        """Let the engine `ragged` use packed copies of the weights on a CPU, where an expert has 32 rows at most.

        A weight that has been changed since by an optimizer, `load_state_dict` or any other operation on it is packed
        anew. A change through `weight.data` goes unseen: call this again then.

        Returns:
            Whether there will be any: nothing is packed where a measurement says that this machine gains nothing.
        """
        self.unpack_experts()
        weights = [weight for weight in self._packable_weights() if packing_pays(weight.dtype)]
        for weight in weights:
            _PACKED[weight.data_ptr()] = _PackedWeight(weight)
        return bool(weights)

    def unpack_experts(self) -> None:
        """Free the packed copies."""
        for weight in self._packable_weights():
            _PACKED.pop(weight.data_ptr(), None)

    def _packable_weights(self) -> list[Tensor]:
        weights = [weight for block in self.moe_blocks() for weight in block.experts.parameters()]
        return [weight for weight in weights if weight.device.type == "cpu" and not is_quantized(weight)]


class _PackedWeight:
    """What is packed of one weight (E, out, in), as long as that lives and stays as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.owner = weakref.ref(weight)
        self.version = weight._version
        self.experts: dict[int, Tensor] = {}

    def is_of(self, weight: Tensor) -> bool:
        """The tensor is what was asked to be packed, or an alias of it."""
        owner = self.owner()
        return owner is not None and owner.data_ptr() == weight.data_ptr() and owner.shape == weight.shape

    def expert(self, index: int) -> Tensor:
        """Packed weight (out, in) of one expert."""
        owner = self.owner()
        if owner._version != self.version:
            self.version = owner._version
            self.experts.clear()
        if index not in self.experts:
            self.experts[index] = pack(owner[index])
        return self.experts[index]


_PACKED: dict[int, _PackedWeight] = {}  # by the address of the weight


def packed_weights(weights: Sequence[Tensor], index: int, num_rows: int) -> list[Tensor] | None:
    """The packed weights of one expert, if packing was asked for and suits so many rows."""
    if not _PACKED or num_rows > ROWS_TO_PACK:
        return None
    found = [_PACKED.get(weight.data_ptr()) for weight in weights]
    if not all(entry is not None and entry.is_of(weight) for entry, weight in zip(found, weights, strict=True)):
        return None
    with torch.no_grad():
        return [entry.expert(index) for entry in found]
