"""What gelu, silu and relu_squared run in CUDA C++: csrc/cuda/activation.cuh."""

import torch

from slimkernels.backends.cuda._common import DTYPES, _cuda, dense, launch_place, pointers

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
    shares, partials = 1, None
    if bias is not None:
        shares = _shares(x, *how[:2])
        partials = x.new_empty((shares, bias.numel()), dtype=torch.float32)
    if x.numel():
        _cuda.activation_backward(*pointers(dy, x, bias, dx, partials), shares, *how)
    elif bias is not None:
        partials.zero_()
    return dx, x.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)


def _prepared(x, bias, curve):
    """Tensors without gaps, and what both kernels take after them; without a bias, of one row."""
    x, bias = x.contiguous(), dense(bias)
    N = x.numel() if bias is None else bias.numel()
    bias_dtype = DTYPES[x.dtype if bias is None else bias.dtype]
    how = CURVES[curve], DTYPES[x.dtype], bias_dtype, *launch_place(x)
    return x, bias, (x.numel() // max(N, 1), N, *how)


def _shares(x, M, N):
    """Into how many shares the rows go: enough for eight blocks, of 256 columns and 8 rows at a
    time, on each multiprocessor."""
    blocks = 8 * _cuda.multiprocessors(launch_place(x)[0])
    return max(1, min(-(-M // 8), blocks * 256 // max(N, 1)))
