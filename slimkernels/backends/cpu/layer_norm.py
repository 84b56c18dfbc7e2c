"""LayerNorm on the CPU: csrc/cpu/layer_norm.cpp."""

import torch

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

# Elements below which ATen's float32 norm is the faster, without gradients and with them. Its time
# over ours, forward and backward, an Intel Xeon with AMX, two threads: 0.63 at 1024x384, 0.68 at
# 1024x768, 0.82 at 4096x768, 0.90 at 4096x4096, where it has 1.19 in forward alone (in bfloat16
# 1.33, 1.45, 1.97, 1.54).
MIN_FLOAT32, MIN_FLOAT32_TRAINED = 1 << 23, 1 << 25


def unsupported(x, weight, bias, eps, zero_centered):
    reason = unsupported_tensor(x)
    wanted = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    trained = bool(wanted) and torch.is_grad_enabled()
    least = MIN_FLOAT32_TRAINED if trained else MIN_FLOAT32
    if reason is None and x.dtype == torch.float32 and x.numel() < least:
        which = "with gradients" if trained else "without gradients"
        return (
            f"ATen's float32 norm {which} is faster below {least} elements and input has "
            f"{x.numel()}"
        )
    return reason


def forward(x, weight, bias, eps, zero_centered):
    x = x.contiguous()
    weight, bias, parameter_dtype = norm_parameters(weight, bias)
    N = x.shape[-1]
    y = torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    run(
        _cpu.layer_norm_forward,
        *pointers(x, weight, bias, y, mean, rstd),
        *(x.numel() // N, N, eps, float(zero_centered), DTYPES[x.dtype], parameter_dtype),
    )
    return y, mean, rstd


def backward(dy, x, weight, bias, mean, rstd, zero_centered):
    dy, x = dy.contiguous(), x.contiguous()
    given = weight, bias
    weight, bias, parameter_dtype = norm_parameters(*given)
    N = x.shape[-1]
    dx = torch.empty_like(x)
    dweight, dbias = (empty_gradient(p, x) for p in (weight, bias))
    run(
        _cpu.layer_norm_backward,
        *pointers(dy, x, weight, mean, rstd, dx, dweight, dbias),
        *(x.numel() // N, N, float(zero_centered), DTYPES[x.dtype], parameter_dtype),
    )
    return dx, *as_wanted((dweight, dbias), given)
