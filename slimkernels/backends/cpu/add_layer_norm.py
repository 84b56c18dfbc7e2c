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


def unsupported(x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered):
    reason = unsupported_tensor(x)
    is_sum = dropout_p == 0 and row_scale is None and residual.dtype == x.dtype
    if reason is None and is_sum and x.dtype == torch.float32 and x.numel() < MIN_FLOAT32:
        return (
            f"ATen's float32 norm is faster below {MIN_FLOAT32} elements without dropout, "
            f"and input has {x.numel()}"
        )
    return reason


def forward(x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed):
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    given = x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed
    return _forward(total, *given)


def forward_alone(x, residual, weight, bias, eps):
    """y of a plain sum, which is made where y then takes its place: a third of the traffic less."""
    return _forward(None, x, residual, weight, bias, eps, 0.0, None, False, None)[0]


def _forward(total, x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed):
    x, residual = x.contiguous(), residual.contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    weight, bias, parameter_dtype = norm_parameters(weight, bias)
    N = x.shape[-1]
    y = torch.empty_like(x)
    total = y if total is None else total
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tensors = x, residual, weight, bias, y, total, mean, rstd, seed, row_scale
    run(
        _cpu.add_layer_norm_forward,
        *pointers(*tensors),
        *(x.numel() // N, N, eps, dropout_p, threshold(dropout_p), float(zero_centered)),
        *(DTYPES[x.dtype], DTYPES[total.dtype], parameter_dtype),
    )
    return y, total, mean, rstd


def backward(
    dy,
    dsum,
    total,
    weight,
    bias,
    mean,
    rstd,
    dropout_p,
    row_scale,
    zero_centered,
    seed,
    is_plain_sum,
):
    dy, total = dy.contiguous(), total.contiguous()
    dsum, row_scale = (None if t is None else t.contiguous() for t in (dsum, row_scale))
    given = weight, bias
    weight, bias, parameter_dtype = norm_parameters(*given)
    N = total.shape[-1]
    dresidual = torch.empty_like(total)
    dx = total.new_empty(0) if is_plain_sum else torch.empty_like(dy)
    dweight, dbias = (empty_gradient(p, total) for p in (weight, bias))
    tensors = dy, dsum, total, weight, mean, rstd, dx, dresidual, dweight, dbias, seed, row_scale
    run(
        _cpu.add_layer_norm_backward,
        *pointers(*tensors),
        *(total.numel() // N, N, dropout_p, threshold(dropout_p), float(zero_centered)),
        *(DTYPES[dy.dtype], DTYPES[total.dtype], parameter_dtype),
    )
    return dx, dresidual, *as_wanted((dweight, dbias), given)
