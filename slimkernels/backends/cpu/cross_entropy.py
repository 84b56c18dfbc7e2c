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

LABELS = -1  # the number in a dtype's place for a target that holds none of floats


def unsupported(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    if target.requires_grad:
        return "the gradient of target's probabilities is torch's"
    return unsupported_tensor(x)


def forward(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    x, target, weight = x.contiguous(), target.contiguous(), float_of(weight)
    losses, total, *saved = losses_of(
        *(x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap),
        return_correct,
    )
    return losses if reduction == "none" else total, *saved


def losses_of(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    """From tensors without gaps, in float32: losses (M,), the loss of them all, stats, divisor; and
    which rows' labels are the argmax (M,) bool, empty if nobody asks."""
    M = x.shape[0]
    losses = x.new_empty(M, dtype=torch.float32)
    total = x.new_empty((), dtype=torch.float32)
    stats = x.new_empty((3, M), dtype=torch.float32)
    divisor = x.new_empty(1, dtype=torch.float32)
    correct = x.new_empty(M if return_correct else 0, dtype=torch.bool)
    run(
        _cpu.cross_entropy_forward,
        *pointers(x, target, weight, losses, total, stats, divisor, correct),
        *(*x.shape, ignore_index, label_smoothing, z_loss, softcap, int(reduction == "mean")),
        *(DTYPES[x.dtype], DTYPES.get(target.dtype, LABELS)),
    )
    return losses, total, stats, divisor, correct


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
    x, target, weight = x.contiguous(), target.contiguous(), float_of(weight)
    dx = torch.empty_like(x)
    how = ignore_index, reduction, label_smoothing, z_loss, softcap
    write_gradient(dx, float_of(dy), float_of(dlse), x, target, weight, stats, divisor, *how)
    return dx


def write_gradient(
    dx,
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
    """Into dx, which may be x itself; from tensors without gaps."""
    divisor = divisor if reduction == "mean" else None
    run(
        _cpu.cross_entropy_backward,
        *(pointer(dy), int(reduction == "none")),
        *pointers(dlse, x, target, weight, stats, divisor, dx),
        *(*x.shape, ignore_index, label_smoothing, z_loss, softcap),
        *(DTYPES[x.dtype], DTYPES.get(target.dtype, LABELS)),
    )


def float_of(x):
    """An optional tensor in float32 without gaps."""
    return None if x is None else as_dtype(x, torch.float32).contiguous()
