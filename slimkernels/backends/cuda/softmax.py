"""Softmax in CUDA C++: csrc/cuda/softmax.cuh."""

from array import array

import torch

from slimkernels.backends._mask import mask_rows
from slimkernels.backends.cuda._common import (
    DTYPES,
    _cuda,
    address,
    dense,
    dtype_number,
    launch_place,
    pointers,
    unsupported_row,
    unsupported_tensor,
)

_MASK_DTYPES = {torch.bool: -1, **DTYPES}


def unsupported(x, dim, scale, mask, is_causal, sinks, dropout_p):
    if dim != -1:
        return "it is written for rows, dim -1"
    if dropout_p > 0:
        return "it has no dropout"
    return unsupported_row(x) or unsupported_tensor(x)


def forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    x = x.contiguous()
    y = torch.empty_like(x)
    shares = None if sinks is None else x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        mask = None if mask is None else mask_rows(mask)
        problem = _problem(x, mask, is_causal, sinks)
        _cuda.softmax_forward(
            *pointers(x, None if mask is None else mask.mask, dense(sinks), y, shares),
            *(address(problem), scale, DTYPES[x.dtype], *launch_place(x)),
        )
    return y, x.new_empty(0), x.new_empty(0, dtype=torch.float32) if shares is None else shares


def backward(dy, y, shares, dim, scale, dropout_p, seed):
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    has_sinks = shares.dim() > 1
    products = torch.empty_like(shares) if has_sinks else None
    if y.numel():
        N = y.shape[-1]
        _cuda.softmax_backward(
            *pointers(dy, y, shares if has_sinks else None, dx, products),
            *(y.numel() // N, N, scale, DTYPES[y.dtype], *launch_place(y)),
        )
    elif has_sinks:
        products.zero_()
    if not has_sinks:
        return dx, y.new_empty(0, dtype=torch.float32)
    heads = products.dim() - 2
    return dx, products.sum([d for d in range(products.dim()) if d != heads])


def _problem(x, mask, is_causal, sinks):
    """struct SoftmaxProblem of csrc/cuda/softmax.cu, which lives as long as the call."""
    N = x.shape[-1]
    queries = x.shape[-2] if x.dim() > 1 else 1
    heads = 1 if sinks is None else sinks.shape[0]
    sizes = x.numel() // N, N, queries if is_causal else 0, queries, heads
    mask_dtype = 0 if mask is None else _MASK_DTYPES[mask.mask.dtype]
    places = (1, 1, 0, 0, 0, 0) if mask is None else mask[1:]
    return array("q", (*sizes, mask_dtype, dtype_number(sinks), *places))
