"""Softmax on the CPU: csrc/cpu/softmax.cpp."""

from array import array

import torch

from slimkernels.backends._mask import mask_rows
from slimkernels.backends.cpu._common import DTYPES, _cpu, pointer, run, unsupported_tensor


def unsupported(x, scale, mask, is_causal):
    return unsupported_tensor(x)


def forward(x, scale, mask, is_causal):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        N = x.shape[-1]
        mask, *places = (None,) if mask is None else mask_rows(mask)
        places = array("q", places)  # lives as long as the call
        run(
            _cpu.softmax_forward,
            *(pointer(x), pointer(mask), pointer(y), places.buffer_info()[0]),
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
            *(pointer(t) for t in (dy, y, dx)),
            *(y.numel() // N, N, scale, DTYPES[y.dtype]),
        )
    return dx
