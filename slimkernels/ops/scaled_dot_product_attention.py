"""Attention (Vaswani et al. 2017): softmax(query @ key^T * scale) @ value, dense or ragged.

The kernels never store the scores: they walk the keys in blocks with a running maximum and sum
(Rabe and Staats 2021; Dao et al. 2022, FlashAttention) and recompute the probabilities in backward
from lse = log(sum(exp(scores))) of each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.dispatch import (
    Op,
    distinct,
    kernel_op,
    may_skip_dispatcher,
    needs_gradient,
    on_device_of,
)
from slimkernels.ops._attention_arguments import NAME, call_of, check_values
from slimkernels.ops._attention_reference import scaled_dot_product_attention_reference
from slimkernels.ops._attention_variant import AttentionVariant, Call
from slimkernels.ops._dropout import draw_seed
from slimkernels.ops._first_order import first_order
from slimkernels.ops._score_function import run_kernels


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    variant: AttentionVariant | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(query @ key^T * scale) @ value, without storing the scores.

    query        (B, H, Tq, D)     float32, float16, bfloat16 or float64, any strides
    key          (B, Hkv, Tk, D)   same dtype
    value        (B, Hkv, Tk, Dv)  same dtype
    attn_mask    broadcasts to (B, H, Tq, Tk): bool, True where query sees key, or a bias in query's
                 dtype or float32 that is added to the scores and gets a gradient of its own shape
    dropout_p    probability of dropping a score, in [0, 1); survivors are multiplied by
                 1 / (1 - dropout_p). Pass 0 outside training.
    is_causal    query i sees keys j <= i, counted from the top left as in torch;
                 flash-attention counts from the bottom right (AttentionVariant.causal_offset)
    scale        multiplies the products; default 1 / sqrt(D)
    enable_gqa   allows H to be a multiple of Hkv; query head h reads key head h // (H // Hkv)
    key_lengths  (B,) int32: keys at and after this index are ignored
    cu_seqlens   (B + 1,) int32: sequences of different lengths without padding. Then query is
                 (Tq, H, D), key and value (Tk, Hkv, D), and sequence b is the tokens from
                 cu_seqlens[b] up to cu_seqlens[b + 1]; it sees no other. A pair for queries and
                 keys where they differ. Starts with 0, ends with T, never falls: checked on the
                 CPU only, since on a GPU the check would wait for the device; there a token that
                 no sequence has gets an undefined output and gradient, and boundaries that fall
                 may end backend "cuda" in a CUDA error, after a minute.
    variant      an AttentionVariant: bias beside a mask, window, ALiBi, softcap, sinks, relative
                 bias, your own function, in any combination
    return_lse   also return lse, the log of softmax's denominator, through which gradients flow
    Returns      (B, H, Tq, Dv) or (Tq, H, Dv), query's dtype, contiguous; computed in float32
                 (float64 for float64). A query that sees no key, or only scores of -inf, gives
                 zero, as in torch 2.13, zero gradients, and an lse of -inf. lse is (B, H, Tq) or
                 (H, Tq), float32 (float64 for float64), in natural logarithm.
    Saves        query, key, value, output and two float32 a query and head: O(T) memory
    Caution      Nothing in another sequence or past key_lengths is ever seen, NaN included. But NaN
                 or infinity in a key or value that another mask hides may reach the queries that
                 do not see it, as in torch.
                 Under autocast query, key, value and a floating attn_mask are cast to its dtype, as
                 by torch, unless query, key or value is float64.
                 torch.func's grad, jvp and vmap, and second derivatives, want use_backend("torch").
                 The backend "torch" stores all scores, with cu_seqlens those between sequences too:
                 O(H * Tq * Tk) memory. explain() says when it runs, and why.
    Errors       ValueError naming the argument whose shape, dtype, device or value is wrong
    """
    *tensors, call = call_of(
        *(query, key, value, attn_mask, dropout_p, is_causal),
        scale=scale,
        enable_gqa=enable_gqa,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
        variant=variant,
        return_lse=return_lse,
    )
    chosen = SCALED_DOT_PRODUCT_ATTENTION.select(*tensors, call, backend=backend)
    if dropout_p > 0:
        call = call._replace(seed=draw_seed(query.device))
    if chosen == "torch":
        y, lse = scaled_dot_product_attention_reference(*tensors, call)
        return (y, lse) if return_lse else y
    if needs_gradient(*tensors, *call[:3]):
        return _Attention.apply(*distinct(*tensors, *call.flat()), return_lse, chosen)
    y, lse = _forward(*tensors, call, chosen)
    return (y, lse[0]) if return_lse else y


# Order: triton before cuda until a table of GPU measurements says otherwise.
SCALED_DOT_PRODUCT_ATTENTION = Op(NAME, order=("triton", "cuda", "cpu"), arguments=call_of)


def _forward(query, key, value, call, backend):
    """The output, and lse as kernels keep it; past the registered op where nobody needs it."""
    if may_skip_dispatcher((query, key, value, *call.tensors)):
        module = SCALED_DOT_PRODUCT_ATTENTION.modules[backend]
        given = query, module.forward, query, key, value, call
        return run_kernels(on_device_of, *given, function=call.function)
    return scaled_dot_product_attention_forward(query, key, value, *call.packed(), backend)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, *flat_and_backend):
        *flat, return_lse, backend = flat_and_backend
        call = Call.from_flat(tuple(flat))
        y, lse = _forward(query, key, value, call, backend)
        tensors, *ctx.options = call.packed()
        ctx.save_for_backward(query, key, value, y, lse, *tensors)
        ctx.function = call.function  # of which options have but the name
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        ctx.set_materialize_grads(False)
        return (y, lse[0].clone()) if return_lse else y

    @staticmethod
    @first_order(NAME)
    def backward(ctx, saved, dy, dlse=None):
        query, key, value, y, lse, *tensors = saved
        if dy is None:
            dy = torch.zeros_like(y)
        wanted = [int(needed) for needed in ctx.needs_input_grad[:6]]
        gradients = scaled_dot_product_attention_backward(
            *(dy, dlse, query, key, value, y, lse, tensors),
            *(*ctx.options, wanted, ctx.backend),
        )
        gradients = [g if w else None for g, w in zip(gradients, wanted, strict=True)]
        return *gradients, *(None,) * (len(ctx.needs_input_grad) - 6)


def _forward_fake(query, key, value, tensors, floats, integers, function, backend):
    call = Call.unpacked(tensors, floats, integers, function)
    if call.function is not None:
        call.function.keep()  # a graph is being made
    rows = (query.shape[1], query.shape[0]) if call.ragged else query.shape[:-1]
    y = query.new_empty(*query.shape[:-1], value.shape[-1])
    return y, query.new_empty((2, *rows), dtype=torch.float32)


@kernel_op("scaled_dot_product_attention_forward", _forward_fake)
def scaled_dot_product_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tensors: Sequence[Tensor | None],
    floats: Sequence[float],
    integers: Sequence[int],
    function: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and (2, ...) float32: lse, and what its rounding left out.

    A mask of -1e9 that hides all keys alike moves lse to where one float32 cannot tell 1 from n.
    """
    call = Call.unpacked(tensors, floats, integers, function)
    check_values(query, key, call)
    module = SCALED_DOT_PRODUCT_ATTENTION.modules[backend]
    return run_kernels(module.forward, query, key, value, call, function=call.function)


def _backward_fake(
    dy,
    dlse,
    query,
    key,
    value,
    output,
    lse,
    tensors,
    floats,
    integers,
    function,
    wanted,
    backend,
):
    call = Call.unpacked(tensors, floats, integers, function)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if w else query.new_empty(0)
        for t, w in zip((query, key, value, *call[:3]), wanted, strict=True)
    )


@kernel_op("scaled_dot_product_attention_backward", _backward_fake)
def scaled_dot_product_attention_backward(
    dy: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    tensors: Sequence[Tensor | None],
    floats: Sequence[float],
    integers: Sequence[int],
    function: str,
    wanted: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, bias, sinks and table; an empty tensor for each not wanted.

    A product that nothing needs (frozen keys and values of an encoder) is left out.
    """
    call = Call.unpacked(tensors, floats, integers, function)
    gradients = run_kernels(
        SCALED_DOT_PRODUCT_ATTENTION.modules[backend].backward,
        *(dy, dlse, query, key, value, output, lse, call, tuple(bool(w) for w in wanted)),
        function=call.function,
    )
    # A kernel may make one that nobody wants beside one that somebody does.
    return tuple(g if w else query.new_empty(0) for g, w in zip(gradients, wanted, strict=True))
