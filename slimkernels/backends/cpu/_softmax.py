"""What softmax and log_softmax share on the CPU: csrc/cpu/softmax.cpp and softmax_columns.cpp."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from slimkernels.backends._dropout import threshold
from slimkernels.backends._mask import MaskRows, mask_columns, mask_rows
from slimkernels.backends.cpu._common import DTYPES, _cpu, address, pointers, run

_MASK_DTYPES = {torch.bool: -1, **DTYPES}


def softmax_of(x, dim, scale, mask, is_causal, sinks=None, dropout_p=0.0, seed=None, log=False):
    """y; y before dropout, empty without; the sinks' shares, empty without."""
    x = x.contiguous()
    y = torch.empty_like(x)
    kept = x.new_empty(0) if seed is None else torch.empty_like(x)
    shares = x.new_empty((0,) if sinks is None else x.shape[:-1], dtype=torch.float32)
    if x.numel():
        places = None
        if mask is not None:
            places = mask_rows(mask) if dim == -1 else mask_columns(mask)
        problem = _problem(x, dim, log, False, dropout_p, is_causal, places, sinks)
        mask = None if places is None else places.mask
        if dim == -1:
            sinks = None if sinks is None else sinks.contiguous()
            given = pointers(x, mask, sinks, y, _or_none(kept), _or_none(shares), seed)
            run(_cpu.softmax_forward, *given, address(problem), scale, dropout_p)
        else:
            given = pointers(x, mask, y, _or_none(kept), seed)
            run(_cpu.softmax_columns_forward, *given, address(problem), scale, dropout_p)
    return y, kept, shares


def gradients_of(dy, y, dim, scale, shares=None, dropout_p=0.0, seed=None, log=False, hides=False):
    """dx and the sinks' gradient in float32, empty without sinks."""
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    has_sinks = shares is not None and shares.dim() > 1
    dsinks = y.new_empty(shares.shape[-2] if has_sinks else 0, dtype=torch.float32)
    if not y.numel():
        return dx, dsinks.zero_()
    problem = _problem(y, dim, log, hides, dropout_p, heads=dsinks.shape[0])
    if dim == -1:
        given = pointers(dy, y, shares, dx, _or_none(dsinks), seed)
        run(_cpu.softmax_backward, *given, address(problem), scale, dropout_p)
    else:
        given = pointers(dy, y, dx, seed)
        run(_cpu.softmax_columns_backward, *given, address(problem), scale, dropout_p)
    return dx, dsinks


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def _problem(
    x: Tensor,
    dim: int,
    log: bool,
    hides: bool,
    dropout_p: float,
    is_causal: bool = False,
    places: MaskRows | None = None,
    sinks: Tensor | None = None,
    heads: int = 0,
) -> array:
    """struct SoftmaxProblem of csrc/cpu/softmax.h, which lives as long as the call."""
    N, inner = x.shape[dim], 1 if dim == -1 else x.shape[-1]
    queries = x.shape[-2] if x.dim() > 1 else 1
    mask_dtype, sinks_dtype = -1, 0
    if places is not None:
        mask_dtype = _MASK_DTYPES[places.mask.dtype]
    if sinks is not None:
        heads, sinks_dtype = sinks.shape[0], DTYPES[sinks.dtype]
    return array(
        "q",
        (
            *(log, hides, x.numel() // (N * inner), N, inner),
            *(queries if is_causal else 0, queries, heads, threshold(dropout_p)),
            *(DTYPES[x.dtype], mask_dtype, sinks_dtype),
            *((1, 1, 0, 0, 0, 0) if places is None else places[1:]),
        ),
    )
