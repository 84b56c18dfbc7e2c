"""Attention on the CPU: csrc/cpu/scaled_dot_product_attention.cpp and _backward.cpp."""

import functools
from array import array

import torch

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends._dropout import threshold
from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    address,
    pointer,
    pointers,
    run,
    unsupported_tensor,
)

_NO_LIMIT = 1 << 40  # farther than any key, and sums of it do not overflow


def unsupported(query, key, value, call):
    if call.function is not None:
        return "your own score functions are Triton or PyTorch code, which C++ cannot call"
    return unsupported_tensor(query)


def forward(query, key, value, call):
    query, key, value = (with_whole_rows(t) for t in (query, key, value))
    problem, _problem_tensors = _problem(query, key, value, call)
    variant, _variant_tensors = _variant(call)
    y = query.new_empty(*query.shape[:-1], value.shape[-1])
    rows = (query.shape[1], query.shape[0]) if call.ragged else query.shape[:-1]
    lse = query.new_empty(2, *rows, dtype=torch.float32)
    run(
        _cpu.scaled_dot_product_attention_forward,
        *pointers(query, key, value, y, lse, call.seed),
        *(address(problem), address(variant), call.scale, call.softcap, call.dropout_p),
        *(threshold(call.dropout_p), DTYPES[query.dtype]),
    )
    return y, lse


def backward(dy, dlse, query, key, value, output, lse, call, wanted):
    dy, query, key, value = (with_whole_rows(t) for t in (dy, query, key, value))
    problem, _problem_tensors = _problem(query, key, value, call, dy, dlse)
    variant, variant_tensors = _variant(call)
    gradients = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if w else None
        for t, w in zip((query, key, value), wanted[:3], strict=True)
    ]
    bias, sinks, table = (t if w else None for t, w in zip(call[:3], wanted[3:], strict=True))
    dbias = dsinks = drelative = dtable = None
    if bias is not None:
        dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    if sinks is not None:
        dsinks = query.new_empty(sinks.shape, dtype=torch.float32)
    if table is not None:
        drelative = torch.empty_like(variant_tensors[-1])
    saved = dy, dlse, query, key, value, output.contiguous(), lse.contiguous()
    run(
        _cpu.scaled_dot_product_attention_backward,
        *pointers(*saved, *gradients, dbias, dsinks, drelative, call.seed),
        *(address(problem), address(variant), call.scale, call.softcap, call.dropout_p),
        *(threshold(call.dropout_p), DTYPES[query.dtype]),
    )
    if sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    if table is not None:
        dtable = drelative.new_zeros(table.shape)
        dtable = dtable.index_add_(0, call.buckets, drelative.mT).to(table.dtype)
    return *gradients, dbias, dsinks, dtable


def _problem(query, key, value, call, dy=None, dlse=None):
    """struct Problem in csrc/cpu/attention.h, and tensors that must live as long as it."""
    dy = query if dy is None else dy
    numbers = _numbers(
        call.cu_seqlens_q.shape[0] - 1 if call.ragged else None,
        *(query.shape, value.shape),
        (query.stride(), key.stride(), value.stride(), dy.stride()),
        None if dlse is None else dlse.stride(),
        *(call.left, call.right, call.causal_offset),
        _limits(call.bias, call.mask),
    )
    integers = call.key_lengths, call.causal_offsets, call.cu_seqlens_q, call.cu_seqlens_k
    if integers[0] is integers[1] is integers[2] is None:
        return numbers, integers
    integers = [None if t is None else t.contiguous() for t in integers]
    return numbers[:-4] + array("q", pointers(*integers)), integers


# Remembered, since a program makes a few kinds of calls, and each of them often.
@functools.lru_cache(maxsize=256)
def _numbers(sequences, query, value, strides, of_dlse, left, right, causal_offset, limits):
    """struct Problem, its pointers null, from shapes and strides. No sequences: not ragged."""
    if sequences is None:
        (sequences, H, Tq, D), (_, Hkv, Tk, Dv) = query, value
        strides = [of_batches[:3] for of_batches in strides]
    else:
        (Tq, H, D), (Tk, Hkv, Dv) = query, value
        strides = [(0, of_heads, of_tokens) for of_tokens, of_heads, _ in strides]
    of_dlse = (0, 0, 0) if of_dlse is None else (0, *of_dlse)[-3:]
    numbers = (
        *(sequences, H, Hkv, Tq, Tk, D, Dv),
        *(min(left, _NO_LIMIT), min(right, _NO_LIMIT), causal_offset),
        *limits,
        *(n for three in (*strides, of_dlse) for n in three),
        *(0, 0, 0, 0),
    )
    return array("q", numbers)


def _limits(bias, mask):
    """Where the last dimensions of a bias and a mask end: what lies past them is hidden."""
    if bias is mask is None:
        return _NO_LIMIT, _NO_LIMIT
    grids = [t for t in (bias, mask) if t is not None]
    return tuple(
        min([t.shape[n] for t in grids if t.shape[n] != 1], default=_NO_LIMIT) for n in (2, 3)
    )


def _variant(call):
    """The start of struct Variant in csrc/cpu/attention_scores.h, likewise; None if it is empty."""
    bias, sinks, table, buckets, mask, slopes = call[:6]
    if bias is sinks is table is mask is slopes is None:
        return None, []
    sinks = None if sinks is None else sinks.float().contiguous()
    relative = None if table is None else table.float().index_select(0, buckets).mT.contiguous()
    numbers = (
        *_grid(bias),
        *_grid(mask),
        *((0, 0, 0, 0, 0) if bias is None else (DTYPES[bias.dtype], *bias.shape)),
        pointer(slopes),
        *((0, 0) if slopes is None else _steps(slopes)),
        *(pointer(sinks), pointer(relative), 0 if table is None else len(buckets) // 2),
    )
    return array("q", numbers), [sinks, relative]


def _grid(x):
    return (0, 0, 0, 0, 0) if x is None else (pointer(x), *_steps(x))


def _steps(x):
    """Strides, 0 along what has size one and serves all."""
    return tuple(0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))
