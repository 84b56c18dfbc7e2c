"""Attention in CUDA C++ for Hopper: csrc/cuda/attention_sm90.cuh, attention_sm90_backward.cuh.

What forward saves is what the Triton kernels save.
"""

import torch

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends.cuda._common import (
    ARCHITECTURES,
    DTYPES,
    _cuda,
    capability,
    launch_place,
    unsupported_tensor,
)

MAX_WIDTH = 256
_LEAST_SCALE = 2.0**-149
IS_BUILT = any(built[:3] == (9, 0, True) for built in ARCHITECTURES)
_MOST_TOKENS = 2**29  # csrc/cuda/attention_tiles.cuh adds three such numbers in 32 bits


def unsupported(query, key, value, call):
    refusal = unsupported_tensor(query) or _unsupported_call(call)
    if refusal is not None:
        return refusal
    if query.dtype == torch.float32:
        return "it is written for float16 and bfloat16 and input is torch.float32"
    for name, width in (("query", query.shape[-1]), ("value", value.shape[-1])):
        if width > MAX_WIDTH or width % 8:
            return (
                f"a head must be a multiple of 8 and at most {MAX_WIDTH} wide and {name}'s has "
                f"{width}"
            )
    if max(query.numel() // query.shape[-1], key.numel() // key.shape[-1]) > _MOST_TOKENS:
        return f"it takes at most {_MOST_TOKENS} tokens, of all heads together"
    major, minor = capability(query)
    if (major, minor) != (9, 0):
        return f"it is written for compute capability 9.0 and {query.device} has {major}.{minor}"
    if not IS_BUILT:
        return f"it needs code for 9.0a and the extension was built for {_cuda.architectures}"
    return None


def forward(query, key, value, call):
    query, scale = _with_positive_scale(query, call.scale)
    query, key, value = (_readable(t) for t in (query, key, value))
    rows = (query.shape[1], query.shape[0]) if call.ragged else query.shape[:-1]
    y = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty((2, *rows), dtype=torch.float32)
    if not y.numel():
        return y, lse
    if not _has_pairs(query, key, call):
        lse[0], lse[1] = -torch.inf, 0.0
        return y.zero_(), lse
    integers = _integers(call)
    _cuda.attention_forward(
        *(_address(t) for t in (query, key, value, y, lse, *integers)),
        *(*_sizes(query, key, value, call), *_strides(query), *_strides(key), *_strides(value)),
        *(call.left, call.right, call.causal_offset, scale, call.softcap),
        *(DTYPES[query.dtype], *launch_place(query)),
    )
    return y, lse


def backward(dy, dlse, query, key, value, output, lse, call, wanted):
    wants_keys = wanted[1] or wanted[2]  # one kernel makes both
    dq, dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if is_wanted else None
        for t, is_wanted in ((query, wanted[0]), (key, wants_keys), (value, wants_keys))
    )
    if _has_pairs(query, key, call):
        _launch_backward(dy, dlse, query, key, value, output, lse, call, (dq, dk, dv))
    else:
        for gradient in (dq, dk, dv):
            if gradient is not None:
                gradient.zero_()
    return dq, dk, dv, None, None, None


def _launch_backward(dy, dlse, query, key, value, output, lse, call, gradients):
    query, scale = _with_positive_scale(query, call.scale)
    query, key, value, dy = (_readable(t) for t in (query, key, value, dy))
    output, lse = output.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    integers, sizes = _integers(call), _sizes(query, key, value, call)
    wants_all = gradients[0] is not None and gradients[1] is not None
    sequences, heads, _, tokens, _, *widths = sizes
    room = lse.new_empty(
        _cuda.attention_backward_bytes(sequences, heads, tokens, *widths, call.ragged, wants_all),
        dtype=torch.uint8,
    )
    _cuda.attention_backward(
        *(_address(t) for t in (query, key, value, dy, output, lse, dlse, room)),
        *(_address(t) for t in (*gradients, *integers)),
        *(*sizes, *_strides(query), *_strides(key), *_strides(value)),
        *(*_strides(dy), call.left, call.right, call.causal_offset, scale, call.scale),
        *(call.softcap, DTYPES[query.dtype], *launch_place(query)),
    )


def _has_pairs(query, key, call):
    """Whether any sequence can have a query and a key; nothing is launched for none."""
    is_any = not call.ragged or call.cu_seqlens_q.shape[0] > 1
    return is_any and query.numel() > 0 and key.numel() > 0


def _unsupported_call(call):
    """What a call may ask for and the kernel does not have."""
    absent = (
        ("dropout", call.dropout_p > 0),
        ("bias", call.bias is not None),
        ("boolean mask", call.mask is not None),
        ("ALiBi", call.alibi_slopes is not None),
        ("sinks", call.sinks is not None),
        ("relative bias", call.table is not None),
        ("functions of your own", call.function is not None),
    )
    for name, is_asked_for in absent:
        if is_asked_for:
            return f"it has no {name}"
    return None


def _with_positive_scale(query, scale):
    """The kernel takes the maximum of products, that of scores only if the scale is above 0."""
    if abs(scale) < _LEAST_SCALE:  # would be 0 in float32, and make NaN of -inf, a hidden score
        return query * 0.0, 1.0
    if scale < 0:
        return -query, -scale
    return query, scale


def _readable(x):
    """x, or a copy of it that TMA can read: all but neighbours in a head 16 bytes apart or more."""
    x = with_whole_rows(x)
    steps = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    if x.data_ptr() % 16 == 0 and all(n == 1 or (s > 0 and s % 8 == 0) for n, s in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(x):
    """Of batch, head and token."""
    return x.stride()[:3] if x.dim() == 4 else (0, x.stride(1), x.stride(0))


def _integers(call):
    """The call's integer tensors, in the kernels' order; to be kept until the launch."""
    integers = call.cu_seqlens_q, call.cu_seqlens_k, call.key_lengths, call.causal_offsets
    return [None if t is None else t.contiguous() for t in integers]


def _address(x):
    return 0 if x is None else x.data_ptr()


def _sizes(query, key, value, call):
    """Sequences, heads, key heads, queries, keys, and the widths."""
    sequences = call.cu_seqlens_q.shape[0] - 1 if call.ragged else query.shape[0]
    tokens = 0 if call.ragged else 2
    heads = query.shape[1], key.shape[1]
    return (
        *(sequences, *heads, query.shape[tokens], key.shape[tokens]),
        *(query.shape[-1], value.shape[-1]),
    )
