"""What gelu, silu and relu_squared run in CUDA C++: csrc/cuda/activation.cuh."""

import torch

from slimkernels.backends.cuda._common import (
    DTYPES,
    _cuda,
    dense,
    dtype_number,
    launch_place,
    pointers,
)

# Mirrors enum Curve in csrc/cuda/ops.h.
CURVES = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu_squared": 3}


def forward(x, bias, curve):
    x, bias, how = _prepared(x, bias, curve)
    y = torch.empty_like(x)
    if x.numel():
        _cuda.activation_forward(*pointers(x, bias, y), *how)
    return y


def backward(dy, x, bias, curve):
    dy = dy.contiguous()
    x, bias, how = _prepared(x, bias, curve)
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    parts, partials, dbias = 1, None, None
    if bias is not None:
        dbias = torch.empty_like(bias)
        parts = _cuda.activation_parts(*how[:2], launch_place(x)[0])
        partials = x.new_empty((parts, bias.numel()), dtype=torch.float32)
    _cuda.activation_backward(*pointers(dy, x, bias, dx, dbias, partials), parts, *how)
    return dx, x.new_empty(0) if bias is None else dbias


def _prepared(x, bias, curve):
    """Tensors without gaps, and what both kernels take after them; without a bias, of one row."""
    x, bias = x.contiguous(), dense(bias)
    N = x.numel() if bias is None else bias.numel()
    how = CURVES[curve], DTYPES[x.dtype], dtype_number(bias), *launch_place(x)
    return x, bias, (x.numel() // max(N, 1), N, *how)
