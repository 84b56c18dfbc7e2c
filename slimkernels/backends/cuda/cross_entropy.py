"""Cross-entropy in CUDA C++: csrc/cuda/cross_entropy.cuh."""

import torch

from slimkernels.backends.cuda._common import (
    DTYPES,
    _cuda,
    dense,
    launch_place,
    pointers,
    unsupported_row,
    unsupported_tensor,
)


def unsupported(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    if target.is_floating_point():
        return "it is written for class labels, and target holds probabilities"
    return unsupported_row(x) or unsupported_tensor(x)


def forward(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    x, target, weight = x.contiguous(), target.contiguous(), _float_of(weight)
    M, V = x.shape
    losses = x.new_empty(M, dtype=torch.float32)
    total = None if reduction == "none" else losses.new_empty(())
    stats = x.new_empty((3, M), dtype=torch.float32)
    divisor = x.new_empty(1, dtype=torch.float32)
    correct = x.new_empty(M if return_correct else 0, dtype=torch.bool)
    _cuda.cross_entropy_forward(
        *pointers(x, target, weight, losses, total, stats, divisor),
        *(correct.data_ptr() if return_correct else 0, M, V),
        *(ignore_index, label_smoothing, z_loss, softcap, int(reduction == "mean")),
        *(DTYPES[x.dtype], *launch_place(x)),
    )
    return losses if total is None else total, stats, divisor, correct


def backward(
    dy,
    dlse,
    x,
    target,
    weight,
    stats,
    divisor,
    ignore_index,
    reduction,
    label_smoothing,
    z_loss,
    softcap,
):
    dy, dlse, x, target = map(dense, (dy.to(torch.float32), dlse, x, target))
    dx = torch.empty_like(x)
    if x.numel():
        divisor = divisor if reduction == "mean" else None
        _cuda.cross_entropy_backward(
            *pointers(dy, dlse, x, target, _float_of(weight), stats, divisor, dx),
            *(*x.shape, ignore_index, label_smoothing, z_loss, softcap, int(reduction == "none")),
            *(DTYPES[x.dtype], *launch_place(x)),
        )
    return dx


def _float_of(weight):
    """Class weights in float32: a block reads them once a row, from the caches."""
    return None if weight is None else weight.to(torch.float32).contiguous()
