"""residual + dropout(x + bias) on the CPU: csrc/cpu/bias_dropout_add.cpp."""

import torch

from slimkernels.backends._dropout import threshold
from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    empty_gradient,
    pointers,
    run,
    unsupported_size,
    unsupported_tensor,
)

# Elements below which eager's two additions are the faster where nothing is dropped out. Their time
# over ours, forward and backward, float32 and bfloat16, an Intel Xeon with AMX, two threads: 0.88
# and 0.99 at 1024x384, 1.05 and 1.24 at 1024x768, about 2 at 8192x3072. With dropout torch is
# slower from 128x256 on, 1.8 and 2.0 there; at 64x64, where it has 0.84 and 0.85, the definition,
# which torch would have to run, is slower still.
MIN_ELEMENTS = 1 << 19


def unsupported(x, bias, residual, dropout_p):
    size = 0 if dropout_p > 0 else MIN_ELEMENTS
    return unsupported_tensor(x) or unsupported_size(x.numel(), size)


def forward(x, bias, residual, dropout_p, seed):
    x = x.contiguous()
    bias, residual = (None if t is None else t.contiguous() for t in (bias, residual))
    y = torch.empty_like(x)
    run(
        _cpu.bias_dropout_add_forward,
        *pointers(x, bias, residual, y, seed),
        *_how(x, bias, dropout_p),
    )
    return y


def backward(dy, bias, dropout_p, seed):
    dy = dy.contiguous()
    dx = dy.new_empty(0) if seed is None else torch.empty_like(dy)
    dbias = empty_gradient(bias, dy)
    given = dy, dx, None if bias is None else dbias, seed
    run(
        _cpu.bias_dropout_add_backward,
        *pointers(*given),
        *_how(dy, bias, dropout_p),
    )
    return dx, dbias


def _how(x, bias, dropout_p):
    """What both kernels take after their pointers."""
    N = x.shape[-1]
    bias_dtype = DTYPES[x.dtype if bias is None else bias.dtype]
    M = x.numel() // max(N, 1)
    return M, N, dropout_p, threshold(dropout_p), DTYPES[x.dtype], bias_dtype
