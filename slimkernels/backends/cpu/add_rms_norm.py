"""RMSNorm of residual + row_scale * dropout(x) on the CPU: csrc/cpu/add_rms_norm.cpp."""

import torch

from slimkernels.backends._dropout import threshold
from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    empty_gradient,
    norm_parameters,
    pointers,
    run,
    unsupported_tensor,
)

# Elements below which torch's addition and rms_norm are the faster where nothing is dropped out, as
# a call of ours costs more. Their time over ours, forward and then with backward, an Intel Xeon
# with AMX, two threads, float32: 0.51 and 0.75 at 64x64, 0.71 and 1.06 at 256x128, 1.00 and 1.7 at
# 256x256, 3.9 and 4.0 at 1024x768 (bfloat16: 0.66 and 0.87, 1.12 and 1.32, 1.42 and 2.6, 5.2 and
# 6.9).
MIN_ELEMENTS = 1 << 16


def unsupported(x, residual, weight, eps, dropout_p, row_scale, zero_centered):
    reason = unsupported_tensor(x)
    is_plain_sum = dropout_p == 0 and row_scale is None and residual.dtype == x.dtype
    is_torchs = not zero_centered and (weight is None or weight.dtype == x.dtype)
    if reason is None and is_plain_sum and is_torchs and x.numel() < MIN_ELEMENTS:
        return (
            f"torch's addition and norm are faster below {MIN_ELEMENTS} elements without dropout, "
            f"and input has {x.numel()}"
        )
    return reason


def forward(x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed):
    x, residual = x.contiguous(), residual.contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    weight, _, parameter_dtype = norm_parameters(weight, None)
    N = x.shape[-1]
    y, total = torch.empty_like(x), torch.empty_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    run(
        _cpu.add_rms_norm_forward,
        *pointers(x, residual, weight, y, total, rstd, seed, row_scale),
        *(x.numel() // N, N, eps, dropout_p, threshold(dropout_p), float(zero_centered)),
        *(DTYPES[x.dtype], DTYPES[total.dtype], parameter_dtype),
    )
    return y, total, rstd


def backward(
    dy, dsum, total, weight, rstd, dropout_p, row_scale, zero_centered, seed, is_plain_sum
):
    dy, total = dy.contiguous(), total.contiguous()
    dsum, row_scale = (None if t is None else t.contiguous() for t in (dsum, row_scale))
    weight, _, parameter_dtype = norm_parameters(weight, None)
    N = total.shape[-1]
    dresidual = torch.empty_like(total)
    dx = total.new_empty(0) if is_plain_sum else torch.empty_like(dy)
    dweight = empty_gradient(weight, total)
    tensors = dy, dsum, total, weight, rstd, dx, dresidual, dweight, seed, row_scale
    run(
        _cpu.add_rms_norm_backward,
        *pointers(*tensors),
        *(total.numel() // N, N, dropout_p, threshold(dropout_p), float(zero_centered)),
        *(DTYPES[dy.dtype], DTYPES[total.dtype], parameter_dtype),
    )
    return dx, dresidual, dweight
