# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Every name of transformers that is not at its top level and has moved before, imported in this one place.

`tests/model/test_compat.py` tells when one of them changes.
"""

from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ExpertsInterface
from transformers.integrations.moe import _grouped_linear as grouped_linear
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ROPE_INIT_FUNCTIONS",
    "ExpertsInterface",
    "GradientCheckpointingLayer",
    "ModelOutput",
    "OutputRecorder",
    "can_return_tuple",
    "capture_outputs",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "dynamic_rope_update",
    "find_packed_sequence_indices",
    "grouped_linear",
    "merge_with_config_defaults",
    "use_experts_implementation",
]
