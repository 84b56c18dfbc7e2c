"""Softmax on the CPU: csrc/cpu/softmax.cpp."""

from array import array

import torch

from slimkernels.backends._mask import mask_rows
from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    address,
    pointers,
    run,
    unsupported_tensor,
)

# Elements below which ATen's softmax is the faster where nothing is scaled or masked, since a call
# of it costs less. Its time over ours, forward and with backward, an Intel Xeon with AMX, one
# thread, float32: 0.39 and 0.46 at 64x64, 0.91 and 0.63 at 256x128, 1.06 and 0.71 at 512x128, 1.12
# and 0.84 at 2048x128, 1.07 and 0.95 at 4096x128 (in bfloat16 0.42 and 0.49, 0.98 and 0.65, 1.10
# and 0.82, 1.14 and 0.95, 1.27 and 1.15).
MIN_PLAIN = 1 << 18


def unsupported(x, scale, mask, is_causal):
    reason = unsupported_tensor(x)
    if reason is None and mask is None and not is_causal and scale == 1 and x.numel() < MIN_PLAIN:
        return (
            f"ATen's softmax is faster below {MIN_PLAIN} elements without scale or mask, "
            f"and input has {x.numel()}"
        )
    return reason


def forward(x, scale, mask, is_causal):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        N = x.shape[-1]
        places = None
        if mask is not None:
            mask, *places = mask_rows(mask)
            places = array("q", places)  # lives as long as the call
        run(
            _cpu.softmax_forward,
            *(*pointers(x, mask, y), address(places)),
            *(x.numel() // N, N, x.shape[-2] if is_causal else 0, scale, DTYPES[x.dtype]),
        )
    return y


def backward(dy, y, scale):
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    if y.numel():
        N = y.shape[-1]
        run(
            _cpu.softmax_backward,
            *pointers(dy, y, dx),
            *(y.numel() // N, N, scale, DTYPES[y.dtype]),
        )
    return dx
