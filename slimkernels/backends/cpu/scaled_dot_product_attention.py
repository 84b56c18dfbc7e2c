"""Attention on the CPU: csrc/cpu/scaled_dot_product_attention.cpp and _backward.cpp."""

from array import array

import torch

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends._dropout import threshold
from slimkernels.backends.cpu._common import DTYPES, _cpu, pointer, run, unsupported_tensor

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
    lse = query.new_empty((2, *rows), dtype=torch.float32)
    run(
        _cpu.scaled_dot_product_attention_forward,
        *(pointer(t) for t in (query, key, value, y, lse, call.seed)),
        *(_address(problem), _address(variant), call.scale, call.softcap, call.dropout_p),
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
        *(pointer(t) for t in (*saved, *gradients, dbias, dsinks, drelative, call.seed)),
        *(_address(problem), _address(variant), call.scale, call.softcap, call.dropout_p),
        *(threshold(call.dropout_p), DTYPES[query.dtype]),
    )
    if sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    if table is not None:
        dtable = drelative.new_zeros(table.shape)
        dtable = dtable.index_add_(0, call.buckets, drelative.mT).to(table.dtype)
    return *gradients, dbias, dsinks, dtable


def _address(numbers):
    return 0 if numbers is None else numbers.buffer_info()[0]


def _problem(query, key, value, call, dy=None, dlse=None):
    """struct Problem in csrc/cpu/attention.h, and tensors that must live as long as it."""
    dy = query if dy is None else dy
    if call.ragged:
        (Tq, H, D), (Tk, Hkv, Dv) = query.shape, value.shape
        B = call.cu_seqlens_q.shape[0] - 1
        strides = [(0, t.stride(1), t.stride(0)) for t in (query, key, value, dy)]
        strides.append((0, 0, 0) if dlse is None else (0, *dlse.stride()))
    else:
        (B, H, Tq, D), (_, Hkv, Tk, Dv) = query.shape, value.shape
        strides = [t.stride()[:3] for t in (query, key, value, dy)]
        strides.append((0, 0, 0) if dlse is None else dlse.stride())
    integers = call.key_lengths, call.causal_offsets, call.cu_seqlens_q, call.cu_seqlens_k
    integers = [None if t is None else t.contiguous() for t in integers]
    numbers = (
        *(B, H, Hkv, Tq, Tk, D, Dv),
        *(min(call.left, _NO_LIMIT), min(call.right, _NO_LIMIT), call.causal_offset),
        *_limits(call.bias, call.mask),
        *(pointer(t) for t in integers),
        *(n for three in strides for n in three),
    )
    return array("q", numbers), integers


def _limits(*grids):
    """Where the last dimensions of a bias and a mask end: what lies past them is hidden."""
    grids = [t for t in grids if t is not None]
    return [min([t.shape[n] for t in grids if t.shape[n] != 1], default=_NO_LIMIT) for n in (2, 3)]


def _variant(call):
    """The start of struct Variant in csrc/cpu/attention_scores.h, likewise; None if it is empty."""
    bias, sinks, table, buckets, mask, slopes = call[:6]
    if all(t is None for t in (bias, sinks, table, mask, slopes)):
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
