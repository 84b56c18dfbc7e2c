"""The norm of many gradients on the CPU: csrc/cpu/grad_norm.cpp."""

import math

import torch

from slimkernels.backends.cpu._common import DTYPES, _cpu, pointer, run
from slimkernels.backends.cpu._tensor_lists import table, unsupported_lists


def unsupported(lists, max_norm, skip_nonfinite):
    return next(filter(None, map(unsupported_lists, lists)), None)


def update(lists, max_norm, skip_nonfinite):
    total = torch.zeros(len(lists), dtype=torch.float64)
    for each, part in zip(lists, total, strict=True):
        dtype = DTYPES[each.first.dtype]
        run(_cpu.sum_of_squares, table(each, ("grad",)), len(each), pointer(part), dtype)
    norm = total.sum().sqrt().item()
    # min() keeps a NaN that comes first.
    coefficient = 1.0 if max_norm is None else min(max_norm / (norm + 1e-6), 1.0)
    applies = not skip_nonfinite or math.isfinite(norm)
    return torch.tensor([norm, coefficient, float(applies)])
