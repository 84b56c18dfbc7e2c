"""The calls that torch's own modules take: NestedTensors, DTensors, what is small in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from slimkernels import dispatch

# Elements of x below which, in evaluation on the CPU, the one call into C++ that torch's attention
# and encoder layer make is faster than our ops one by one (one thread). A layer of torch's: 1.7
# times at (3, 20, 64), 1.3 at (8, 32, 128), 1.2 at (1, 16, 384), 1.1 at (4, 32, 384), level from
# there on. Its attention alone: 1.7, then 1.3 at (8, 32, 128), 1.2 at (2, 64, 384).
MIN_ELEMENTS = 65536


def is_torchs(x: object) -> bool:
    """Whether x is a NestedTensor or a DTensor: no kernel takes these, torch does what it can."""
    if type(x) is Tensor:
        return x.is_nested
    # DTensor's own method: its package is large, and whoever has one has imported it.
    return isinstance(x, Tensor) and (x.is_nested or hasattr(type(x), "redistribute"))


def is_small(x: Tensor) -> bool:
    """Whether torch's path for evaluation is faster for x, if torch has one for the call.

    It raises under autocast on the CPU, and whoever has named a backend gets that. A small model
    asks dozens of times in a forward pass: the checks that decide most often come first.
    """
    if torch.is_grad_enabled() or is_dynamo_compiling() or dispatch._forced is not None:
        return False
    if type(x) is not Tensor:  # what traces has types of its own
        if is_compiling() or is_torchs(x):
            return False
    elif x.is_nested:
        return False
    return x.is_cpu and x.numel() < MIN_ELEMENTS and not torch.is_autocast_enabled("cpu")
