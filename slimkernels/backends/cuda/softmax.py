"""Softmax in CUDA C++: csrc/cuda/softmax.cuh."""

import torch

from slimkernels.backends.cuda._common import DTYPES, _cuda, launch_place, unsupported_tensor


def unsupported(x, dim, scale, mask, is_causal, sinks, dropout_p):
    if mask is not None:
        return "it is written for no mask, or a causal one, and mask is a tensor"
    if dim != -1:
        return "it is written for rows, dim -1"
    if sinks is not None:
        return "it has no sinks"
    if dropout_p > 0:
        return "it has no dropout"
    if x.shape[-1] >= 2**31:
        return f"a row must have fewer than 2^31 elements and has {x.shape[-1]}"
    return unsupported_tensor(x)


def forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        N = x.shape[-1]
        period = x.shape[-2] if is_causal else 0
        _cuda.softmax_forward(
            *(x.data_ptr(), y.data_ptr(), x.numel() // N, N, period, scale),
            *(DTYPES[x.dtype], *launch_place(x)),
        )
    return y, x.new_empty(0), x.new_empty(0, dtype=torch.float32)


def backward(dy, y, shares, dim, scale, dropout_p, seed):
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    if y.numel():
        N = y.shape[-1]
        _cuda.softmax_backward(
            *(dy.data_ptr(), y.data_ptr(), dx.data_ptr(), y.numel() // N, N, scale),
            *(DTYPES[y.dtype], *launch_place(y)),
        )
    return dx, y.new_empty(0, dtype=torch.float32)
