"""From the arguments of attention to a checked Call, or one sentence that says what is wrong."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from slimkernels.dispatch import may_skip_dispatcher
from slimkernels.ops._attention_checks import (
    NAME,
    check_boundaries,
    check_boundary_values,
    check_dense,
    check_device,
    check_integers,
    check_key_lengths,
    check_parameter,
    check_range,
    check_tensors,
    refuse,
)
from slimkernels.ops._attention_variant import AttentionVariant, Call, RelativeBias
from slimkernels.ops._call_memory import CallMemory
from slimkernels.ops._checks import (
    FLOATING,
    autocast_dtype,
    cast_unless_float64,
    check_dropout,
    check_flag,
    check_integer,
    check_number,
)
from slimkernels.ops._score_function import ScoreFunction

# Of offsets and windows: kernels add two of them to a position in 32 bits.
_FARTHEST = 2**29

# Checked calls without further tensors but boundaries; these are not kept. The checks take as long
# as a small call's numbers.
_MOST_KNOWN = 1024
_known_calls = CallMemory(_MOST_KNOWN)
_NO_BOUNDARIES = {"cu_seqlens_q": None, "cu_seqlens_k": None}


def call_of(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
    key_lengths=None,
    cu_seqlens=None,
    variant=None,
    return_lse=False,
) -> tuple[Tensor, Tensor, Tensor, Call]:
    """What the op, the definition and every backend take, without dropout's seed."""
    dtype = autocast_dtype(query)
    if dtype is not None:
        given = query, key, value, attn_mask, variant
        query, key, value, attn_mask, variant = _as_autocast(dtype, *given)
    options = dropout_p, is_causal, scale, enable_gqa, return_lse
    boundaries = cu_seqlens if isinstance(cu_seqlens, tuple) else (cu_seqlens, cu_seqlens)
    outside = (query, key, value, *boundaries), options
    is_pair = cu_seqlens is None or not any([b is None for b in boundaries])
    may_be_known = attn_mask is variant is None and is_pair and not is_dynamo_compiling()
    call = _known_calls.get(outside) if may_be_known else None
    if call is None:
        call = _checked(query, key, value, attn_mask, cu_seqlens, variant, options)
        # What traces has tensors for sizes: they must not be in a call that is kept.
        if may_be_known and may_skip_dispatcher((query, key, value)):
            kept = call if cu_seqlens is None else call._replace(**_NO_BOUNDARIES)
            _known_calls.put(outside, kept)
    elif cu_seqlens is not None:
        call = call._replace(cu_seqlens_q=boundaries[0], cu_seqlens_k=boundaries[1])
    if key_lengths is not None:
        check_key_lengths(key_lengths, query, call)
        call = call._replace(key_lengths=key_lengths)
    if not (key_lengths is attn_mask is cu_seqlens is variant is None):
        check_values(query, key, call)
    return query, key, value, call


def _as_autocast(dtype, query, key, value, attn_mask, variant):
    """What torch's function has, too, is cast as there. A variant's parameters may be float32
    beside any dtype; narrower ones go along, or the checks would refuse them."""
    if any(getattr(t, "dtype", None) == torch.float64 for t in (query, key, value)):
        return query, key, value, attn_mask, variant
    tensors = [cast_unless_float64(t, dtype) for t in (query, key, value, attn_mask)]
    if isinstance(variant, AttentionVariant):
        relative = variant.relative_bias
        if isinstance(relative, RelativeBias):
            relative = relative._replace(table=_unless_float32(relative.table, dtype))
        bias, sinks = (_unless_float32(t, dtype) for t in (variant.bias, variant.sinks))
        variant = variant._replace(bias=bias, sinks=sinks, relative_bias=relative)
    return *tensors, variant


def _unless_float32(x, dtype):
    return x if getattr(x, "dtype", None) == torch.float32 else cast_unless_float64(x, dtype)


def _checked(query, key, value, attn_mask, cu_seqlens, variant, options):
    """The Call of these arguments, all checked; without key_lengths."""
    dropout_p, is_causal, scale, enable_gqa, return_lse = options
    variant = AttentionVariant() if variant is None else variant
    if not isinstance(variant, AttentionVariant):
        refuse("variant", "an AttentionVariant", type(variant).__name__)
    flags = ("is_causal", is_causal), ("enable_gqa", enable_gqa), ("return_lse", return_lse)
    for name, flag in (*flags, ("variant.batch_invariant", variant.batch_invariant)):
        check_flag(NAME, name, flag)
    ragged = cu_seqlens is not None
    check_tensors(query, key, value, ragged, enable_gqa)
    check_dropout(NAME, dropout_p)
    cu_q = cu_k = None
    if ragged:
        cu_q, cu_k = _boundaries(cu_seqlens, query, key)
        B, H, Tq, Tk = cu_q.shape[0] - 1, query.shape[1], None, None
    else:
        (B, H, Tq, _), Tk = query.shape, key.shape[2]
    if scale is not None:
        check_number(NAME, "scale", scale)
    sizes = B, H, Tq, Tk
    mask, bias = _mask_and_bias(attn_mask, variant.bias, query, sizes)
    left, right = _window(variant.window, is_causal)
    offset, offsets = _offset(variant.causal_offset, query, B)
    table, buckets = _relative_bias(variant.relative_bias, query, H)
    function, function_tensors = _function(variant, query)
    return Call(
        bias=bias,
        sinks=_sinks(variant.sinks, query, H),
        table=table,
        buckets=buckets,
        mask=mask,
        alibi_slopes=_slopes(variant.alibi_slopes, query, B, H),
        key_lengths=None,
        causal_offsets=offsets,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        seed=None,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=_softcap(variant.softcap),
        dropout_p=float(dropout_p),
        left=left,
        right=right,
        causal_offset=offset,
        tf32=_tf32(variant.float32_precision),
        batch_invariant=variant.batch_invariant,
        function=function,
        function_tensors=function_tensors,
    )


def check_values(query: Tensor, key: Tensor, call: Call) -> None:
    """Look at the integers in the call's tensors, where the host may.

    Where somebody traces it may not, so the registered op looks when it runs.
    """
    if call.ragged:
        check_boundary_values(call.cu_seqlens_q, "query", query)
        if call.cu_seqlens_k is not call.cu_seqlens_q or len(key) != len(query):
            check_boundary_values(call.cu_seqlens_k, "key", key)
    if call.key_lengths is not None:
        Tk = key.shape[2]
        check_range("key_lengths", f"from 0 to the {Tk} keys", call.key_lengths, 0, Tk)
    if call.causal_offsets is not None:
        what = "variant.causal_offset", "at most 2^29 in size"
        check_range(*what, call.causal_offsets, -_FARTHEST, _FARTHEST)
    if call.buckets is not None:
        last = call.table.shape[0] - 1
        expected = f"rows of table, from 0 to {last}"
        check_range("variant.relative_bias.buckets", expected, call.buckets, 0, last)


def _boundaries(cu_seqlens, query, key):
    """cu_seqlens of the queries and of the keys, checked."""
    pair = cu_seqlens if isinstance(cu_seqlens, tuple | list) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2 or (pair is cu_seqlens and not all(isinstance(t, Tensor) for t in pair)):
        of = ", ".join(type(t).__name__ for t in pair[:3])
        refuse("cu_seqlens", "a tensor or a pair of them", f"{type(pair).__name__} of {of}")
    check_boundaries(pair[0], query)
    check_boundaries(pair[1], key)
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"{NAME}: cu_seqlens of query and key must have one length; got "
            f"{pair[0].shape[0]} and {pair[1].shape[0]}"
        )
    return pair


def _mask_and_bias(attn_mask, bias, query, sizes):
    if attn_mask is not None:
        if not isinstance(attn_mask, Tensor):
            refuse("attn_mask", "a tensor", type(attn_mask).__name__)
        if type(attn_mask).__name__ == "CausalBias":  # torch.nn.attention.bias's, without values
            refuse("attn_mask", "a tensor (is_causal is this one)", "CausalBias")
        check_dense("attn_mask", attn_mask)
        if attn_mask.dtype != torch.bool and attn_mask.dtype not in FLOATING:
            refuse("attn_mask", "bool, True where a key is seen, or floating", attn_mask.dtype)
        if attn_mask.dtype != torch.bool:
            if bias is not None:
                raise ValueError(
                    f"{NAME}: variant.bias must be None with a floating attn_mask, which is one"
                )
            return None, _four("attn_mask", attn_mask, query, sizes)
        attn_mask = _four("attn_mask", attn_mask, query, sizes)
    return attn_mask, None if bias is None else _four("variant.bias", bias, query, sizes)


def _four(name, x, query, sizes):
    """x with all four dimensions, each as large as the scores' or one."""
    if name != "attn_mask" or x.dtype != torch.bool:
        check_parameter(name, x, query)
    check_device(name, x, query)
    if x.dim() > 4:
        refuse(name, "(B, H, Tq, Tk) or broadcast to it", tuple(x.shape))
    shape = tuple(x.shape)
    x = x.reshape((1,) * (4 - x.dim()) + shape)
    if any(s != 1 and n is not None and s != n for s, n in zip(x.shape, sizes, strict=True)):
        wanted = ", ".join("any" if n is None else str(n) for n in sizes)
        raise ValueError(
            f"{NAME}: {name} must broadcast to (B, H, Tq, Tk) = ({wanted}); got {shape}"
        )
    return x


def _window(window, is_causal):
    left, right = -1, -1
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            refuse("variant.window", "(left, right)", repr(window))
        if not all(side is None or _is_reach(side) for side in window):
            expected = "(left, right), each an integer from 0 to 2^29 or None for no limit"
            refuse("variant.window", expected, repr(window))
        left, right = (-1 if side is None else side for side in window)
    return left, 0 if is_causal else right


def _is_reach(side):
    whole = isinstance(side, (Integral, torch.SymInt)) and not isinstance(side, bool)
    return whole and 0 <= side <= _FARTHEST


def _offset(offset, query, B):
    if isinstance(offset, Tensor):
        check_integers("variant.causal_offset", offset, query, B)
        return 0, offset
    check_integer(NAME, "variant.causal_offset", offset)
    if not -_FARTHEST <= offset <= _FARTHEST:
        refuse("variant.causal_offset", "at most 2^29 in size", offset)
    return offset, None


def _sinks(sinks, query, H):
    if sinks is None:
        return None
    check_parameter("variant.sinks", sinks, query)
    if tuple(sinks.shape) != (H,):
        refuse("variant.sinks", f"({H},), one a head", tuple(sinks.shape))
    return sinks


def _slopes(slopes, query, B, H):
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        refuse("variant.alibi_slopes", "a tensor", type(slopes).__name__)
    if slopes.dtype != torch.float32:
        refuse("variant.alibi_slopes", "float32", slopes.dtype)
    check_device("variant.alibi_slopes", slopes, query)
    if tuple(slopes.shape) not in ((H,), (B, H)):
        refuse("variant.alibi_slopes", f"({H},) or ({B}, {H})", tuple(slopes.shape))
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{NAME}: variant.alibi_slopes must not require a gradient; variant.bias may"
        )
    return slopes.reshape(-1, H) if H else slopes.reshape(1, 0)


def _softcap(softcap):
    if softcap is None:
        return 0.0
    check_number(NAME, "variant.softcap", softcap)
    if softcap <= 0:
        refuse("variant.softcap", "above 0, or None", softcap)
    if softcap < 1e-30:  # which scores are divided by, in float32
        refuse("variant.softcap", "at least 1e-30, or None", softcap)
    return float(softcap)


def _relative_bias(relative, query, H):
    if relative is None:
        return None, None
    if not isinstance(relative, RelativeBias):
        refuse("variant.relative_bias", "a RelativeBias", type(relative).__name__)
    table, buckets = relative
    check_parameter("variant.relative_bias.table", table, query)
    if table.dim() != 2 or table.shape[1] != H or table.shape[0] == 0:
        refuse("variant.relative_bias.table", f"(buckets, {H})", tuple(table.shape))
    name, shape = "variant.relative_bias.buckets", "(2 * m + 1,)"
    check_integers(name, buckets, query, shape)
    if buckets.shape[0] % 2 == 0:
        raise ValueError(f"{NAME}: {name} must have shape {shape}; got {tuple(buckets.shape)}")
    return table, buckets


def _function(variant, query):
    function, tensors = variant.score, variant.score_tensors
    if not isinstance(tensors, tuple | list):
        refuse("variant.score_tensors", "a tuple of tensors", type(tensors).__name__)
    if function is None:
        if tensors:
            raise ValueError(f"{NAME}: variant.score_tensors must be empty without score")
        return None, ()
    if not isinstance(function, ScoreFunction):
        refuse("variant.score", "a ScoreFunction", type(function).__name__)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            refuse("variant.score_tensors", "a tuple of tensors", f"{type(tensor).__name__} in it")
        check_device("variant.score_tensors", tensor, query)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{NAME}: variant.score_tensors must not require a gradient: they get none"
            )
    return function, tuple(tensors)


def _tf32(precision):
    if precision not in ("ieee", "tf32"):
        refuse("variant.float32_precision", "'ieee' or 'tf32'", repr(precision))
    return precision == "tf32"
