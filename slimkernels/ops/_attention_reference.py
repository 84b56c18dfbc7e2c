"""The definition of attention, in PyTorch, with every feature. It stores all scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.ops._attention_variant import Call
from slimkernels.ops._checks import autocast_device
from slimkernels.ops._dropout import keep_mask
from slimkernels.ops._ragged import Scores, Weighted, sequence_of


def scaled_dot_product_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, call: Call, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The output, in query's dtype, and lse.

    dtype  what to compute in: float32 by default, or float64 if query is
    """
    wide = dtype or torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    if call.ragged:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (H, T, D)
    group = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(group, dim=-3) for t in (k, v))
    pairs = pairs_of(q, k, call)
    visible = _visible(pairs, call)
    # What no query sees must change nothing, NaN included: 0 * NaN would be NaN.
    unseen = ~visible.any(-2).unsqueeze(-1)
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    score, weigh = _products(call, q, k)
    # Autocast would compute the products in its own dtype, whatever that of their operands.
    with torch.autocast(autocast_device(query), enabled=False):
        scores = _modified(score(q, k) * call.scale, pairs, call)
        scores = scores.masked_fill(~visible, -torch.inf)
        if call.sinks is not None:  # a last key, without a value
            sinks = call.sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sinks), -1)
        # Softmax of nothing but -inf would be NaN. The result, and its gradient, are zero.
        nothing = _sees_nothing(scores)
        scores = scores.masked_fill(nothing, 0.0)
        lse = _log_sum_exp(scores).masked_fill(nothing.squeeze(-1), -torch.inf)
        p = scores.softmax(-1)[..., : k.shape[-2]].masked_fill(~visible | nothing, 0.0)
        if call.seed is not None:
            keep = keep_mask(call.seed, pairs.rows, pairs.j, call.dropout_p)
            p = torch.where(keep, p / (1 - call.dropout_p), 0.0)
        y = weigh(p, v)
    y = y.transpose(0, 1).contiguous() if call.ragged else y
    return y.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))


class Pairs(NamedTuple):
    """Of every pair of query and key, in shapes that broadcast to the scores'."""

    sequence: Tensor  # index of the query's sequence
    head: Tensor
    i: Tensor  # the query's position in its sequence, without causal_offset
    offset: Tensor | int
    j: Tensor  # the key's position in its sequence
    count: Tensor | int  # how many keys its sequence has
    together: Tensor | None  # whether both are in one sequence; None if dense
    rows: Tensor  # dropout's number of a query


def pairs_of(q: Tensor, k: Tensor, call: Call) -> Pairs:
    H, Tq, Tk = q.shape[-3], q.shape[-2], k.shape[-2]
    head = torch.arange(H, device=q.device)[:, None, None]
    i, j = (torch.arange(T, device=q.device) for T in (Tq, Tk))
    if not call.ragged:
        sequence = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        rows, i, together, count = (sequence * H + head) * Tq + i[:, None], i[:, None], None, Tk
        if call.key_lengths is not None:
            count = call.key_lengths[:, None, None, None]
        offset = call.causal_offset
        if call.causal_offsets is not None:
            offset = call.causal_offsets[:, None, None, None]
        return Pairs(sequence, head, i, offset, j, count, together, rows)
    rows = i[:, None] * H + head
    of_i, of_j = sequence_of(call.cu_seqlens_q, Tq), sequence_of(call.cu_seqlens_k, Tk)
    i, j = i - call.cu_seqlens_q[of_i - 1], j - call.cu_seqlens_k[of_j - 1]
    sequence = (of_i - 1)[:, None]
    offset = call.causal_offset
    if call.causal_offsets is not None:
        offset = call.causal_offsets[sequence.clamp(0, len(call.causal_offsets) - 1)]
    together = of_i[:, None] == of_j
    return Pairs(sequence, head, i[:, None], offset, j, Tk, together, rows)


def _visible(pairs: Pairs, call: Call) -> Tensor:
    """Which queries see which keys."""
    i, j = pairs.i + pairs.offset, pairs.j
    visible = (j < pairs.count) & (pairs.i >= 0)
    if pairs.together is not None:
        visible = visible & pairs.together
    if call.left >= 0:
        visible = visible & (j >= i - call.left)
    if call.right >= 0:
        visible = visible & (j <= i + call.right)
    if call.mask is not None:
        visible = visible & _picked(call.mask, pairs, call, False)
    if call.bias is not None and call.ragged:
        visible = visible & _within(call.bias, pairs)
    if call.function is not None and call.function.torch_mask is not None:
        visible = visible & call.function.seen(
            *(pairs.sequence, pairs.head, pairs.i, j), call.function_tensors
        )
    return visible


def _modified(scores: Tensor, pairs: Pairs, call: Call) -> Tensor:
    distance = pairs.j - (pairs.i + pairs.offset)
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        # Widened first, so that its gradient is summed in the wide dtype.
        scores = scores + _picked(call.bias.to(scores.dtype), pairs, call, 0.0)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.to(scores.dtype)
        of = pairs.sequence.clamp(0, len(slopes) - 1)  # one row of slopes may serve all
        scores = scores - slopes[of, pairs.head] * distance.abs()
    if call.table is not None:
        m = len(call.buckets) // 2
        rows = call.buckets[distance.clamp(-m, m) + m]
        scores = scores + call.table.to(scores.dtype)[rows, pairs.head]
    if call.function is not None and call.function.torch_score is not None:
        changed = call.function.changed(
            *(scores, pairs.sequence, pairs.head, pairs.i, pairs.j), call.function_tensors
        )
        scores = changed.to(scores.dtype)  # its tensors may have a wider one
    return scores


def _picked(x: Tensor, pairs: Pairs, call: Call, outside: float | bool) -> Tensor:
    """x, shaped like Call.bias, of every pair; `outside` where ragged and past its end."""
    if not call.ragged:
        return x
    indices = pairs.sequence, pairs.head, pairs.i, pairs.j
    index = [n.clamp(0, max(size - 1, 0)) for n, size in zip(indices, x.shape, strict=True)]
    if x.numel() == 0:
        return torch.full_like(pairs.sequence, outside, dtype=x.dtype)
    return x[tuple(index)].masked_fill(~_within(x, pairs), outside)


def _within(x: Tensor, pairs: Pairs) -> Tensor:
    """Whether a ragged pair's positions are in x, whose dimensions of one serve all."""
    inside = [
        (n < size) if size != 1 else torch.ones_like(n, dtype=torch.bool)
        for n, size in ((pairs.i, x.shape[2]), (pairs.j, x.shape[3]))
    ]
    return inside[0] & inside[1]


def _products(call, q, k):
    """q @ k^T and p @ v, as functions."""
    if not call.ragged:
        return lambda q, k: q @ k.mT, torch.matmul
    of_q = sequence_of(call.cu_seqlens_q, q.shape[-2])
    of_k = sequence_of(call.cu_seqlens_k, k.shape[-2])
    of = of_q, of_k, call.cu_seqlens_q.shape[0] - 1
    return lambda q, k: Scores.apply(q, k, *of), lambda p, v: Weighted.apply(p, v, *of)


def _sees_nothing(scores):
    """Which rows are nothing but -inf, (..., Tq, 1)."""
    if scores.shape[-1] == 0:  # amax of no numbers is an error
        return scores.new_ones(*scores.shape[:-1], 1, dtype=torch.bool)
    return scores.detach().amax(-1, keepdim=True) == -torch.inf


def _log_sum_exp(scores):
    return scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)
