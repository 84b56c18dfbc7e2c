"""GroupNorm on the CPU: csrc/cpu/group_norm.cpp."""

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

# Elements below which ATen's kernel is the faster. Its time over ours, forward and then with
# backward, an Intel Xeon with AMX, two threads, 32 groups: in float32 0.63 and 0.67 at 2x320x8x8,
# 0.88 and 0.68 at 2x320x32x32, 1.13 and 1.58 at 32x64x56x56, 1.1 and 1.1 at 8x320x64x64; in
# bfloat16 0.60 and 0.62, 1.26 and 1.03, 1.05 and 1.83, 1.2 and 1.3. It reads channels last as they
# lie, which we copy: 0.45 and 0.25 in float32 at 8x320x64x64, 0.5 and 1.4 in bfloat16.
MIN_FLOAT32, MIN_ELEMENTS = 1 << 22, 1 << 20


def unsupported(x, num_groups, weight, bias, eps):
    reason = unsupported_tensor(x)
    if reason is not None:
        return reason
    least = MIN_FLOAT32 if x.dtype == torch.float32 else MIN_ELEMENTS
    if x.numel() < least:
        return f"ATen's is faster below {least} elements of {x.dtype} and input has {x.numel()}"
    if not x.is_contiguous() and _has_channels_last(x):
        return "ATen's is faster where input's channels are last in memory"
    return None


def _has_channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


def forward(x, num_groups, weight, bias, eps):
    x = x.contiguous()
    weight, bias, parameter_dtype = norm_parameters(weight, bias)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    run(
        _cpu.group_norm_forward,
        *pointers(x, weight, bias, y, mean, rstd),
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
        *pointers(dy, x, weight, mean, rstd, dx, dweight, dbias),
        *(*_sizes(x, mean.shape[1]), DTYPES[x.dtype], parameter_dtype),
    )
    return dx, *as_wanted((dweight, dbias), given)


def _sizes(x, num_groups):
    """Samples, groups, channels of a group, elements of a channel."""
    return x.shape[0], num_groups, x.shape[1] // num_groups, x.shape[2:].numel()
