"""Attention on the CPU: csrc/cpu/scaled_dot_product_attention.cpp."""

from array import array

import torch

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends._dropout import threshold
from slimkernels.backends.cpu._common import DTYPES, _cpu, pointer, run, unsupported_tensor


def unsupported(query, key, value, call):
    return unsupported_tensor(query) or _feature(query, value, call)


def _feature(query, value, call):
    if call.is_modified or call.mask is not None or call.sinks is not None or call.function:
        return "it has plain scores only"
    if call.left >= 0 or call.right > 0 or call.causal_offset or call.causal_offsets is not None:
        return "it has no window"
    if value.shape[-1] != query.shape[-1]:
        return "value must be as wide as query"
    return None


def forward(query, key, value, call):
    key_lengths, _, cu_seqlens_q, cu_seqlens_k, seed = call[6:11]
    scale, dropout_p, is_causal = call.scale, call.dropout_p, call.right == 0
    query, key, value = (with_whole_rows(t) for t in (query, key, value))
    integers = _whole(key_lengths, cu_seqlens_q, cu_seqlens_k)
    sizes = _sizes(query, key, value, query, cu_seqlens_q)
    ragged = cu_seqlens_q is not None
    y = torch.empty_like(query, memory_format=torch.contiguous_format)
    rows = (query.shape[1], query.shape[0]) if ragged else query.shape[:-1]
    lse = query.new_empty(rows, dtype=torch.float32)
    run(
        _cpu.scaled_dot_product_attention_forward,
        *(pointer(t) for t in (query, key, value, y, lse, *integers, seed)),
        *(sizes.buffer_info()[0], scale, is_causal, dropout_p),
        *(threshold(dropout_p), DTYPES[query.dtype]),
    )
    return y, lse


def backward(dy, dlse, query, key, value, output, lse, call, wanted):
    if dlse is not None:
        raise NotImplementedError("scaled_dot_product_attention: lse has no gradient here yet")
    key_lengths, _, cu_seqlens_q, cu_seqlens_k, seed = call[6:11]
    scale, dropout_p, is_causal = call.scale, call.dropout_p, call.right == 0
    dy, query, key, value = (with_whole_rows(t) for t in (dy, query, key, value))
    integers = _whole(key_lengths, cu_seqlens_q, cu_seqlens_k)
    sizes = _sizes(query, key, value, dy, cu_seqlens_q)
    gradients = [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    ]
    saved = dy, query, key, value, output.contiguous(), lse.contiguous()
    run(
        _cpu.scaled_dot_product_attention_backward,
        *(pointer(t) for t in (*saved, *gradients, *integers, seed)),
        *(sizes.buffer_info()[0], scale, is_causal, dropout_p),
        *(threshold(dropout_p), DTYPES[query.dtype]),
    )
    return *gradients, None, None, None


def _whole(*integers):
    return [None if t is None else t.contiguous() for t in integers]


def _sizes(query, key, value, dy, cu_seqlens_q):
    """The first members of struct Problem in csrc/cpu/attention.h, in its order."""
    if cu_seqlens_q is None:
        B, H, Tq, D = query.shape
        _, Hkv, Tk, _ = key.shape
        strides = [t.stride()[:3] for t in (query, key, value, dy)]
    else:
        (Tq, H, D), (Tk, Hkv, _) = query.shape, key.shape
        B = cu_seqlens_q.shape[0] - 1
        strides = [(0, t.stride(1), t.stride(0)) for t in (query, key, value, dy)]
    return array("q", (B, H, Hkv, Tq, Tk, D, *(n for three in strides for n in three)))
