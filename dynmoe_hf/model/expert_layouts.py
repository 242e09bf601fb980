# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Expert layouts: what is an expert? The options of each; the modules stand in modeling_dynmoe.py, because
transformers looks for its experts decorator in the text of the file that defines the model."""

from dataclasses import dataclass

from huggingface_hub.dataclasses import strict


@strict
@dataclass
class SwigluOptions:
    """`swiglu` has no options: `down(act(gate x) * up x)` with fused weights (E, 2I, D) and (E, D, I)."""


EXPERTS: dict[str, type] = {"swiglu": SwigluOptions}
