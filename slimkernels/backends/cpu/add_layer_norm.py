"""LayerNorm of residual + dropout(x) on the CPU: csrc/cpu/add_layer_norm.cpp."""

import torch

from slimkernels.backends._dropout import threshold
from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    as_wanted,
    empty_gradient,
    norm_parameters,
    pointers,
    run,
    unsupported_tensor,
)

# Elements below which torch's addition and ATen's float32 norm are the faster where nothing is
# dropped out. Their time over ours, forward and backward, an Intel Xeon with AMX, two threads: 0.86
# at 1024x384, 1.00 at 1024x768.
MIN_FLOAT32 = 1 << 19


def unsupported(x, residual, weight, bias, eps, dropout_p):
    reason = unsupported_tensor(x)
    if reason is None and dropout_p == 0 and x.dtype == torch.float32 and x.numel() < MIN_FLOAT32:
        return (
            f"ATen's float32 norm is faster below {MIN_FLOAT32} elements without dropout, "
            f"and input has {x.numel()}"
        )
    return reason


def forward(x, residual, weight, bias, eps, dropout_p, seed):
    x, residual = x.contiguous(), residual.contiguous()
    weight, bias, parameter_dtype = norm_parameters(weight, bias)
    N = x.shape[-1]
    y, total = torch.empty_like(x), torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    run(
        _cpu.add_layer_norm_forward,
        *pointers(x, residual, weight, bias, y, total, mean, rstd, seed),
        *(x.numel() // N, N, eps, dropout_p, threshold(dropout_p)),
        *(DTYPES[x.dtype], parameter_dtype),
    )
    return y, total, mean, rstd


def backward(dy, dsum, total, weight, bias, mean, rstd, dropout_p, seed):
    dy, total = dy.contiguous(), total.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    given = weight, bias
    weight, bias, parameter_dtype = norm_parameters(*given)
    N = total.shape[-1]
    dresidual = torch.empty_like(total)
    dx = total.new_empty(0) if seed is None else torch.empty_like(total)
    dweight, dbias = (empty_gradient(p, total) for p in (weight, bias))
    tensors = dy, dsum, total, weight, mean, rstd, dx, dresidual, dweight, dbias, seed
    run(
        _cpu.add_layer_norm_backward,
        *pointers(*tensors),
        *(total.numel() // N, N, dropout_p, threshold(dropout_p)),
        *(DTYPES[total.dtype], parameter_dtype),
    )
    return dx, dresidual, *as_wanted((dweight, dbias), given)
