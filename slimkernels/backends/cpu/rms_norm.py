"""RMSNorm on the CPU: csrc/cpu/rms_norm.cpp."""

import torch

from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    empty_gradient,
    norm_parameters,
    pointers,
    run,
    unsupported_tensor,
)

# Elements below which torch's rms_norm is the faster, as a call of ours costs more. Its time over
# ours, forward and then with backward, an Intel Xeon with AMX, two threads, float32: 0.50 and 0.84
# at 64x64, 0.60 and 0.80 at 128x128, 1.20 and 1.76 at 256x256, 1.8 and 3.4 at 1024x384 (bfloat16:
# 0.62 and 0.97, 0.77 and 0.95, 1.31 and 1.62, 3.0 and 3.5).
MIN_ELEMENTS = 1 << 16


def unsupported(x, weight, eps, zero_centered):
    reason = unsupported_tensor(x)
    is_torchs = not zero_centered and (weight is None or weight.dtype == x.dtype)
    if reason is None and is_torchs and x.numel() < MIN_ELEMENTS:
        return f"torch's is faster below {MIN_ELEMENTS} elements and input has {x.numel()}"
    return reason


def forward(x, weight, eps, zero_centered):
    x = x.contiguous()
    weight, _, parameter_dtype = norm_parameters(weight, None)
    N = x.shape[-1]
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    run(
        _cpu.rms_norm_forward,
        *pointers(x, weight, y, rstd),
        *(x.numel() // N, N, eps, float(zero_centered), DTYPES[x.dtype], parameter_dtype),
    )
    return y, rstd


def backward(dy, x, weight, rstd, zero_centered):
    dy, x = dy.contiguous(), x.contiguous()
    weight, _, parameter_dtype = norm_parameters(weight, None)
    N = x.shape[-1]
    dx, dweight = torch.empty_like(x), empty_gradient(weight, x)
    run(
        _cpu.rms_norm_backward,
        *pointers(dy, x, weight, rstd, dx, dweight),
        *(x.numel() // N, N, float(zero_centered), DTYPES[x.dtype], parameter_dtype),
    )
    return dx, dweight
