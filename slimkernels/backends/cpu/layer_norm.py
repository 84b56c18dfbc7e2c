"""LayerNorm on the CPU: csrc/cpu/layer_norm.cpp."""

import torch

from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    empty_gradient,
    pointer,
    unsupported_tensor,
)


def unsupported(x, weight, bias, eps):
    return unsupported_tensor(x)


def forward(x, weight, bias, eps):
    x, weight, bias, parameter_dtype = _contiguous(x, weight, bias)
    N = x.shape[-1]
    y = torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _cpu.layer_norm_forward(
        *(pointer(t) for t in (x, weight, bias, y, mean, rstd)),
        *(x.numel() // N, N, eps, DTYPES[x.dtype], parameter_dtype),
    )
    return y, mean, rstd


def backward(dy, x, weight, bias, mean, rstd):
    wanted = weight, bias
    x, weight, bias, parameter_dtype = _contiguous(x, weight, bias)
    dy = dy.contiguous()
    N = x.shape[-1]
    dx = torch.empty_like(x)
    dweight, dbias = (empty_gradient(p, x).contiguous() for p in (weight, bias))
    _cpu.layer_norm_backward(
        *(pointer(t) for t in (dy, x, weight, mean, rstd, dx)),
        *(
            0 if p is None else pointer(g)
            for p, g in zip((weight, bias), (dweight, dbias), strict=True)
        ),
        *(x.numel() // N, N, DTYPES[x.dtype], parameter_dtype),
    )
    return dx, *(
        g if p is None else g.to(p.dtype) for p, g in zip(wanted, (dweight, dbias), strict=True)
    )


def _contiguous(x, weight, bias):
    """Rows and parameters without gaps; parameters of two dtypes both become float32."""
    given = [p for p in (weight, bias) if p is not None]
    dtype = given[0].dtype if len({p.dtype for p in given}) == 1 else torch.float32
    weight, bias = (None if p is None else p.to(dtype).contiguous() for p in (weight, bias))
    return x.contiguous(), weight, bias, DTYPES[dtype]
