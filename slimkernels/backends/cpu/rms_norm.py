"""RMSNorm on the CPU: csrc/cpu/rms_norm.cpp."""

import torch

from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    empty_gradient,
    norm_parameters,
    pointer,
    run,
    unsupported_tensor,
)


def unsupported(x, weight, eps, zero_centered):
    return unsupported_tensor(x)


def forward(x, weight, eps, zero_centered):
    x = x.contiguous()
    weight, _, parameter_dtype = norm_parameters(weight, None)
    N = x.shape[-1]
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    run(
        _cpu.rms_norm_forward,
        *(pointer(t) for t in (x, weight, y, rstd)),
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
        *(pointer(t) for t in (dy, x, weight, rstd, dx, dweight)),
        *(x.numel() // N, N, float(zero_centered), DTYPES[x.dtype], parameter_dtype),
    )
    return dx, dweight
