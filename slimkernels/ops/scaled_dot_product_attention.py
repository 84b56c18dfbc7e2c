"""Attention (Vaswani et al. 2017): softmax(query @ key^T * scale) @ value, dense or ragged.

The kernels never store the scores: they walk the keys in blocks with a running maximum and sum
(Rabe and Staats 2021; Dao et al. 2022, FlashAttention) and recompute the probabilities in backward
from one number a row, lse = log(sum(exp(scores))).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import autocast_device, check_dropout, check_number, check_tensor
from slimkernels.ops._dropout import draw_seed, keep_mask
from slimkernels.ops._ragged import Scores, Weighted, sequence_of


def scaled_dot_product_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """The definition. In float32, or in float64 if query is; stores all scores."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    if cu_seqlens_q is not None:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (H, T, D)
    group = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(group, dim=-3) for t in (k, v))
    visible, rows, cols = _pairs(q, k, is_causal, key_lengths, cu_seqlens_q, cu_seqlens_k)
    # What no query sees must change nothing, NaN included: 0 * NaN would be NaN.
    unseen = ~visible.any(-2).unsqueeze(-1)
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    score, weigh = _products(cu_seqlens_q, cu_seqlens_k, q, k)
    # Autocast would compute the products in its own dtype, whatever that of their operands.
    with torch.autocast(autocast_device(query), enabled=False):
        scores = (score(q, k) * scale).masked_fill(~visible, -torch.inf)
        # Softmax of nothing but -inf would be NaN. The result, and its gradient, are zero.
        nothing = _sees_nothing(scores)
        p = scores.masked_fill_(nothing, 0.0).softmax(-1).masked_fill(~visible, 0.0)
        if seed is not None:
            p = torch.where(keep_mask(seed, rows, cols, dropout_p), p / (1 - dropout_p), 0.0)
        y = weigh(p, v).masked_fill(nothing, 0.0)
    y = y if cu_seqlens_q is None else y.transpose(0, 1).contiguous()
    return y.to(query.dtype)


def _products(cu_seqlens_q, cu_seqlens_k, q, k):
    """q @ k^T and p @ v, as functions."""
    if cu_seqlens_q is None:
        return lambda q, k: q @ k.mT, torch.matmul
    of_q, of_k = sequence_of(cu_seqlens_q, q.shape[-2]), sequence_of(cu_seqlens_k, k.shape[-2])
    of = of_q, of_k, cu_seqlens_q.shape[0] - 1
    return lambda q, k: Scores.apply(q, k, *of), lambda p, v: Weighted.apply(p, v, *of)


def _sees_nothing(scores):
    """Which rows are nothing but -inf, (..., Tq, 1)."""
    if scores.shape[-1] == 0:  # amax of no numbers is an error
        return scores.new_ones(*scores.shape[:-1], 1, dtype=torch.bool)
    return scores.detach().amax(-1, keepdim=True) == -torch.inf


def _pairs(q, k, is_causal, key_lengths, cu_seqlens_q, cu_seqlens_k):
    """Which queries see which keys, and dropout's numbers of queries (rows) and keys (cols)."""
    H, Tq, Tk = q.shape[-3], q.shape[-2], k.shape[-2]
    heads = torch.arange(H, device=q.device)[:, None, None]
    i, j = (torch.arange(T, device=q.device) for T in (Tq, Tk))
    if cu_seqlens_q is None:
        visible = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device)
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        rows = (batch * H + heads) * Tq + i[:, None]
    else:
        rows = i[:, None] * H + heads
        of_i, of_j = sequence_of(cu_seqlens_q, Tq), sequence_of(cu_seqlens_k, Tk)
        i, j = i - cu_seqlens_q[of_i - 1], j - cu_seqlens_k[of_j - 1]  # within the sequence
        visible = of_i[:, None] == of_j
    if is_causal:
        visible = visible & (j <= i[:, None])
    if key_lengths is not None:
        visible = visible & (j < key_lengths[:, None, None, None])
    return visible, rows, j


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(query @ key^T * scale) @ value, without storing the scores.

    query        (B, H, Tq, D)    float32, float16, bfloat16 or float64, any strides
    key, value   (B, Hkv, Tk, D)  same dtype; H is a multiple of Hkv, and query head h reads key
                 head h // (H // Hkv)
    dropout_p    probability of dropping a score, in [0, 1); survivors are multiplied by
                 1 / (1 - dropout_p). Pass 0 outside training.
    is_causal    query i sees keys j <= i, counted from the top left as in torch;
                 flash-attention counts from the bottom right
    scale        multiplies the scores; default 1 / sqrt(D)
    key_lengths  (B,) int32: keys at and after this index are ignored
    cu_seqlens   (B + 1,) int32: sequences of different lengths without padding. Then query is
                 (Tq, H, D), key and value (Tk, Hkv, D), and sequence b is the tokens from
                 cu_seqlens[b] up to cu_seqlens[b + 1]; it sees no other. A pair for queries and
                 keys where they differ. Starts with 0, ends with T, never falls: checked on the
                 CPU in eager mode only, since on a GPU the check would wait for the device.
    Returns      query's shape and dtype, contiguous; computed in float32 (float64 for float64).
                 A query that sees no key, or only scores of -inf, gives zero, as in torch 2.13,
                 and zero gradients.
    Saves        query, key, value, output and lse, one float32 a query and head: O(T) memory
    Caution      Nothing in another sequence or past key_lengths is ever seen, NaN included. But NaN
                 or infinity in a key or value that only is_causal hides may reach the queries
                 before it, as in torch.
                 The backend "torch" stores all scores, with cu_seqlens those between sequences too:
                 O(H * Tq * Tk) memory. It is what runs float64, float16 on a CPU, heads wider than
                 256 on a GPU, and all else where Triton (GPU) or the extension (CPU) is missing.
    Errors       ValueError naming the argument whose shape, dtype, device or value is wrong
    """
    args = _arguments(
        *(query, key, value),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        key_lengths=key_lengths,
        cu_seqlens=cu_seqlens,
    )
    chosen = SCALED_DOT_PRODUCT_ATTENTION.select(*args, backend=backend)
    seed = draw_seed(query.device) if dropout_p > 0 else None
    if chosen == "torch":
        return scaled_dot_product_attention_reference(*args, seed)
    if needs_gradient(query, key, value):
        return _Attention.apply(*distinct(*args), seed, chosen)
    return scaled_dot_product_attention_forward(*args, seed, chosen)[0]


def _arguments(
    query,
    key,
    value,
    *,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    key_lengths=None,
    cu_seqlens=None,
):
    ragged = cu_seqlens is not None
    _check_tensors(query, key, value, ragged)
    check_dropout(_NAME, dropout_p)
    cu_q = cu_k = None
    if ragged:
        if key_lengths is not None:
            raise ValueError(
                f"{_NAME}: key_lengths must be None with cu_seqlens, which has the lengths"
            )
        cu_q, cu_k = _boundaries(cu_seqlens, query, key)
    elif key_lengths is not None:
        _check_integers("key_lengths", key_lengths, query, query.shape[0])
        _check_key_lengths(key_lengths, key.shape[2])
    if scale is not None:
        check_number(_NAME, "scale", scale)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return query, key, value, float(dropout_p), bool(is_causal), scale, key_lengths, cu_q, cu_k


_NAME = "scaled_dot_product_attention"


def _check_tensors(query, key, value, ragged):
    layout = "(T, H, D), as cu_seqlens asks" if ragged else "(B, H, T, D)"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(_NAME, name, tensor)
        if tensor.dim() != (3 if ragged else 4):
            raise ValueError(f"{_NAME}: {name} must be {layout}; got {tuple(tensor.shape)}")
        for what in ("dtype", "device"):
            expected, actual = getattr(query, what), getattr(tensor, what)
            if expected != actual:
                raise ValueError(
                    f"{_NAME}: {name} must have query's {what} {expected}; got {actual}"
                )
    shape, heads = tuple(query.shape), -2 if ragged else -3
    if query.shape[-1] == 0:
        raise ValueError(f"{_NAME}: query {shape} has no elements in a head")
    if key.shape[-1] != query.shape[-1] or (not ragged and key.shape[0] != query.shape[0]):
        what = "width" if ragged else "batch and width"
        raise ValueError(f"{_NAME}: key must have query's {what} {shape}; got {tuple(key.shape)}")
    if value.shape != key.shape:
        raise ValueError(
            f"{_NAME}: value must have key's shape {tuple(key.shape)}; got {tuple(value.shape)}"
        )
    H, Hkv = query.shape[heads], key.shape[heads]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"{_NAME}: query's heads must be a multiple of key's {Hkv}; got {H}")


def _check_integers(name, value, query, size):
    if not isinstance(value, Tensor):
        raise ValueError(f"{_NAME}: {name} must be a tensor; got {type(value).__name__}")
    if value.dtype != torch.int32:
        raise ValueError(f"{_NAME}: {name} must be int32; got {value.dtype}")
    if value.device != query.device:
        raise ValueError(f"{_NAME}: {name} must be on {query.device}; got {value.device}")
    if value.dim() != 1 or (size is not None and value.shape[0] != size):
        expected = "(sequences + 1,)" if size is None else f"({size},), one a batch row"
        raise ValueError(f"{_NAME}: {name} must have shape {expected}; got {tuple(value.shape)}")


def _readable(values: Tensor) -> bool:
    """Whether the host may look at the values: not on a GPU, not while torch.compile traces."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def _boundaries(cu_seqlens, query, key):
    """cu_seqlens of the queries and of the keys, checked."""
    pair = cu_seqlens if isinstance(cu_seqlens, tuple | list) else (cu_seqlens, cu_seqlens)
    if len(pair) != 2:
        raise ValueError(f"{_NAME}: cu_seqlens must be a tensor or a pair; got {len(pair)} of them")
    _check_boundaries(pair[0], "query", query)
    _check_boundaries(pair[1], "key", key)
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"{_NAME}: cu_seqlens of query and key must have one length; got "
            f"{pair[0].shape[0]} and {pair[1].shape[0]}"
        )
    return pair


def _check_boundaries(cu_seqlens, of, tensor):
    _check_integers("cu_seqlens", cu_seqlens, tensor, None)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{_NAME}: cu_seqlens must have shape (sequences + 1,); got (0,)")
    if not _readable(cu_seqlens):
        return
    values, T = cu_seqlens.tolist(), tensor.shape[0]
    if values[0] != 0 or values[-1] != T:
        raise ValueError(
            f"{_NAME}: cu_seqlens of {of} must go from 0 to its {T} tokens; "
            f"got {values[0]} to {values[-1]}"
        )
    if any(a > b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"{_NAME}: cu_seqlens of {of} must not fall; got {values}")


def _check_key_lengths(key_lengths, Tk):
    if not _readable(key_lengths) or key_lengths.numel() == 0:
        return
    low, high = (int(value) for value in key_lengths.aminmax())
    if low < 0 or high > Tk:
        raise ValueError(
            f"{_NAME}: key_lengths must be from 0 to the {Tk} keys; got {low} to {high}"
        )


# Order: triton before cuda until a table of GPU measurements says otherwise.
SCALED_DOT_PRODUCT_ATTENTION = Op(_NAME, order=("triton", "cuda", "cpu"), arguments=_arguments)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        query, key, value, *options, key_lengths, cu_q, cu_k, seed, backend = args
        y, lse = scaled_dot_product_attention_forward(*args)
        ctx.save_for_backward(query, key, value, y, lse, key_lengths, cu_q, cu_k, seed)
        ctx.options = options  # dropout_p, is_causal, scale
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        *saved, key_lengths, cu_q, cu_k, seed = ctx.saved_tensors
        gradients = scaled_dot_product_attention_backward(
            dy, *saved, *ctx.options, key_lengths, cu_q, cu_k, seed, ctx.backend
        )
        return *gradients, *(None,) * 8


def _contiguous_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(
    query,
    key,
    value,
    dropout_p,
    is_causal,
    scale,
    key_lengths,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    backend,
):
    rows = query.shape[:-1] if cu_seqlens_q is None else (query.shape[1], query.shape[0])
    return _contiguous_like(query), query.new_empty(rows, dtype=torch.float32)


@kernel_op("scaled_dot_product_attention_forward", _forward_fake)
def scaled_dot_product_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return SCALED_DOT_PRODUCT_ATTENTION.modules[backend].forward(
        *(query, key, value, dropout_p, is_causal, scale),
        *(key_lengths, cu_seqlens_q, cu_seqlens_k, seed),
    )


def _backward_fake(
    dy,
    query,
    key,
    value,
    output,
    lse,
    dropout_p,
    is_causal,
    scale,
    key_lengths,
    cu_seqlens_q,
    cu_seqlens_k,
    seed,
    backend,
):
    return _contiguous_like(query), _contiguous_like(key), _contiguous_like(value)


@kernel_op("scaled_dot_product_attention_backward", _backward_fake)
def scaled_dot_product_attention_backward(
    dy: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    key_lengths: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return SCALED_DOT_PRODUCT_ATTENTION.modules[backend].backward(
        *(dy, query, key, value, output, lse, dropout_p, is_causal, scale),
        *(key_lengths, cu_seqlens_q, cu_seqlens_k, seed),
    )
