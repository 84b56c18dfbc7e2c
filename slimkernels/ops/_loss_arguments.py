"""Checks that cross_entropy and linear_cross_entropy share: options, labels, positions."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops._checks import check_integer, check_number, is_readable, value_range

REDUCTIONS = ("none", "mean", "sum")


def check_loss_options(op, ignore_index, reduction, label_smoothing, z_loss, softcap):
    """What both take besides tensors."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum'; got {reduction!r}")
    check_integer(op, "ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must be an int64; got {ignore_index}")
    check_number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1]; got {label_smoothing}")
    check_number(op, "z_loss", z_loss)
    if z_loss < 0.0:
        raise ValueError(f"{op}: z_loss must be at least 0; got {z_loss}")
    if softcap is not None:
        check_number(op, "softcap", softcap)
        if softcap <= 0.0:
            raise ValueError(f"{op}: softcap must be None or above 0; got {softcap}")


def check_labels(op, target, shape, whose, device):
    """`target` holds class labels, in a shape and on a device."""
    if not isinstance(target, Tensor):
        raise ValueError(f"{op}: target must be a tensor; got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: target must hold class labels, int64 or int32; got {target.dtype}")
    if tuple(target.shape) != shape:
        raise ValueError(
            f"{op}: target must have shape {shape}, {whose}; got {tuple(target.shape)}"
        )
    if target.device != device:
        raise ValueError(f"{op}: target must be on {device} like input; got {target.device}")


def check_label_range(op, target, V, ignore_index):
    """Where reading the labels costs nothing: not on a GPU, not while compiling."""
    if not is_readable(target) or target.numel() == 0:
        return
    low, high = value_range(target)
    if low >= 0 and high < V:  # the common case, in one pass over the labels
        return
    wrong = ((target < 0) | (target >= V)) & (target != ignore_index)
    if not wrong.any():
        return
    position = tuple(wrong.nonzero()[0].tolist())
    raise ValueError(
        f"{op}: target must be in [0, {V}) or ignore_index {ignore_index}; "
        f"got {int(target[position])} at position {position}"
    )


def check_positions(op, positions, x):
    if not isinstance(positions, Tensor):
        raise ValueError(f"{op}: positions must be a tensor; got {type(positions).__name__}")
    if positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: positions must be int64 or int32; got {positions.dtype}")
    if positions.dim() != 1:
        raise ValueError(f"{op}: positions must have shape (K,); got {tuple(positions.shape)}")
    if positions.device != x.device:
        raise ValueError(
            f"{op}: positions must be on {x.device} like input; got {positions.device}"
        )
    if x.shape[0] == 0 and positions.shape[0] > 0:
        raise ValueError(f"{op}: positions must be empty, as input is; got {positions.shape[0]}")
    check_position_range(op, positions, x.shape[0])


def check_position_range(op, positions, N):
    """Where looking costs nothing, as check_label_range."""
    if not is_readable(positions) or positions.numel() == 0:
        return
    low, high = value_range(positions)
    if low < 0 or high >= N:
        got = low if low < 0 else high
        raise ValueError(f"{op}: positions must be in [0, {N}), rows of input; got {got}")
