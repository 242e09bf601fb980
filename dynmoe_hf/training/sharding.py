"""What sharded training needs to know of this model."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import Trainer


class ShardedTrainer(Trainer):
    """A Trainer whose FSDP2 casts weights, and nothing else, to the dtype of mixed precision.

    accelerate would have it cast what goes into a decoder layer and what comes out, too. Scores, probabilities and the
    state of recurrent routers among that are float32; autocast sees to the rest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy = dataclasses.replace(
                plugin.mixed_precision_policy, output_dtype=None, cast_forward_inputs=False
            )
