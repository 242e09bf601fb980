# Copyright 2026 The dynmoe_hf developers. Licensed under the Apache License, Version 2.0.
"""Experts' weights that torchao (https://github.com/pytorch/ao) has quantised. No part of it is imported here.

Such a weight is one tensor (E, out, in) of a class of torchao, which can be taken apart into experts and multiplied one
expert at a time. Nearly everything else raises NotImplementedError.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def is_quantized(weight: Tensor) -> bool:
    """The weight is a tensor of torchao."""
    return hasattr(weight, "tensor_data_names")


def dequantized(weight: Tensor) -> Tensor:
    """The weight itself, or the plain tensor that a quantised one stands for: a copy in its full size."""
    return weight.dequantize() if is_quantized(weight) else weight


def expert_linear(rows: Tensor, weight: Tensor, expert: int) -> Tensor:
    """Rows (n, in) and one expert of a weight (E, out, in), plain or quantised, -> (n, out).

    A quantised one is multiplied in the way that torchao has for it; gradients reach the rows only.
    """
    if not is_quantized(weight):
        return F.linear(rows, weight[expert])
    with torch.inference_mode(False):  # in inference mode torchao cannot make the view
        own = weight[expert]
    return F.linear(rows, own)
