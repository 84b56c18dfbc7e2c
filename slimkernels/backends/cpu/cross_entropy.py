"""Cross-entropy on the CPU: csrc/cpu/cross_entropy.cpp."""

import torch

from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    as_dtype,
    pointer,
    pointers,
    run,
    unsupported_tensor,
)


def unsupported(x, target, ignore_index, reduction, label_smoothing):
    return unsupported_tensor(x)


def forward(x, target, ignore_index, reduction, label_smoothing):
    x, target = x.contiguous(), target.contiguous()
    M, V = x.shape
    losses = x.new_empty(M, dtype=torch.float32)
    total = x.new_empty((), dtype=torch.float32)
    lse = x.new_empty((2, M), dtype=torch.float32)
    count = x.new_empty(1, dtype=torch.float32)
    run(
        _cpu.cross_entropy_forward,
        *pointers(x, target, losses, total, lse, count),
        *(M, V, ignore_index, label_smoothing, int(reduction == "mean"), DTYPES[x.dtype]),
    )
    return as_dtype(losses if reduction == "none" else total, x.dtype), lse, count


def backward(dy, x, target, lse, count, ignore_index, reduction, label_smoothing):
    x, target = x.contiguous(), target.contiguous()
    M, V = x.shape
    dx = torch.empty_like(x)
    dy = as_dtype(dy, torch.float32).contiguous()
    divisor = count if reduction == "mean" else None
    run(
        _cpu.cross_entropy_backward,
        *(pointer(dy), int(reduction == "none")),
        *pointers(x, target, lse, divisor, dx),
        *(M, V, ignore_index, label_smoothing, DTYPES[x.dtype]),
    )
    return dx
