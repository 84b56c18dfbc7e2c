"""GroupNorm on the CPU: csrc/cpu/group_norm.cpp."""

import torch

from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    as_wanted,
    empty_gradient,
    norm_parameters,
    pointer,
    run,
    unsupported_tensor,
)


def unsupported(x, num_groups, weight, bias, eps):
    return unsupported_tensor(x)


def forward(x, num_groups, weight, bias, eps):
    x = x.contiguous()
    weight, bias, parameter_dtype = norm_parameters(weight, bias)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    run(
        _cpu.group_norm_forward,
        *(pointer(t) for t in (x, weight, bias, y, mean, rstd)),
        *(*_sizes(x, num_groups), eps, DTYPES[x.dtype], parameter_dtype),
    )
    return y, mean, rstd


def backward(dy, x, weight, bias, mean, rstd):
    dy, x = dy.contiguous(), x.contiguous()
    given = weight, bias
    weight, bias, parameter_dtype = norm_parameters(*given)
    dx = torch.empty_like(x)
    dweight, dbias = (empty_gradient(p, x) for p in (weight, bias))
    run(
        _cpu.group_norm_backward,
        *(pointer(t) for t in (dy, x, weight, mean, rstd, dx, dweight, dbias)),
        *(*_sizes(x, mean.shape[1]), DTYPES[x.dtype], parameter_dtype),
    )
    return dx, *as_wanted((dweight, dbias), given)


def _sizes(x, num_groups):
    """Samples, groups, channels of a group, elements of a channel."""
    return x.shape[0], num_groups, x.shape[1] // num_groups, x.shape[2:].numel()
