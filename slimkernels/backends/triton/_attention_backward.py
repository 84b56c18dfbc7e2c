"""The gradients of attention in Triton; scaled_dot_product_attention.py launches them.

With P the probabilities, P' the same after dropout and dP = dropout's gradient of dy @ v^T:

    dv = P'^T @ dy    dS = P * (dP - delta)    dq = scale * dS @ k    dk = scale * dS^T @ q
    delta = rowsum(P * dP) = rowsum(dy * y)

Tiling    dq: a program owns BLOCK_M queries and walks the keys. dk, dv: a program owns BLOCK_N keys
          of one key head and walks the queries of every head that reads it. Each result has one
          writer: no atomics and the same bits on every run, for seven products a pair of tiles
          where adding dq up in memory would take five.
Numerics  P comes from lse, one float32, and delta from the rounded y. In 16 bits that is below
          eager's own rounding. In float32 it is not where scores are large: exp(score - lse) is off
          by the rounding of lse, 2e-5 at 300. So float32 pays two more products for the sums of P,
          by which dv divides it (to dq and dk it is a factor as good as their scores), and for
          delta from P and dP themselves, whose roundings cancel.
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._attention import (
    dropout_keys,
    exp_of,
    extent,
    key_extent,
    load_lse,
    load_tile,
    locate,
    query_tile,
    scale_early,
    sees,
    store_tile,
)
from slimkernels.backends.triton._common import keep_mask


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    dy, y, delta_ptr, T, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """delta = rowsum(dy * y). A sum needs no boundaries: all ragged tokens are one sequence."""
    head = tl.program_id(1).to(tl.int64)
    sequence, first = locate(tl.program_id(0), T, None, BLOCK_M)
    batch, begin, _ = extent(sequence, T, None)
    tokens = begin + first + tl.arange(0, BLOCK_M)
    present = tokens < T
    dys = load_tile(dy, batch, head, begin + first, present, D, BLOCK_M, BLOCK_D)
    ys = load_tile(y, batch, head, begin + first, present, D, BLOCK_M, BLOCK_D)
    delta = tl.sum(dys.to(tl.float32) * ys.to(tl.float32), axis=1)
    tl.store(delta_ptr + (batch * tl.num_programs(1) + head) * T + tokens, delta, mask=present)


@triton.jit(do_not_specialize=["Tq", "Tk", "threshold"])
def _row_sums_kernel(
    dy,
    y,
    q,
    k,
    v,
    statistics,
    lengths,
    seed_ptr,
    threshold,
    factor,
    Tq,
    Tk,
    group,
    scale,
    IS_CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sums over all keys of P, which would be 1 if P came from more than lse, and delta."""
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    batch, q_begin, k_begin, first, q_count, whole, seen = query_tile(
        Tq, Tk, lengths, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    if first >= q_count:
        return
    i = first + tl.arange(0, BLOCK_M)
    present = i < q_count
    tokens = q_begin + i
    at = (batch * H + head) * Tq + tokens
    lse = load_lse(statistics, at, present)
    queries = load_tile(q, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    queries, late = scale_early(queries, scale)
    dys = load_tile(dy, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    if seed_ptr is not None:
        key0, key1 = dropout_keys(seed_ptr, batch, head, tokens, H, Tq, lengths.cu_q is not None)
    ys = load_tile(y, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    # Nearly delta already; what it lacks is small, and so is the rounding of that.
    delta = tl.sum(dys * ys, axis=1)
    total = tl.zeros((BLOCK_M,), tl.float32)
    lacking = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, seen, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, batch, head // group, k_begin + start, j < seen, D, BLOCK_N, BLOCK_D)
        values = load_tile(v, batch, head // group, k_begin + start, j < seen, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(queries, keys.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        p = exp_of(scores, late, lse[:, None], values.dtype)
        if start >= whole:
            p = tl.where(sees(i, j, seen, IS_CAUSAL), p, 0.0)
        dp = tl.dot(dys, values.T, input_precision="ieee")
        if seed_ptr is not None:
            keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
            dp = tl.where(keep, dp * factor, 0.0)
        total += tl.sum(p, axis=1)
        lacking += tl.sum(p * (dp - delta[:, None]), axis=1)

    total = tl.where(total == 0.0, 1.0, total)  # no key, or only scores of -inf
    tl.store(statistics.delta + at, delta + lacking / total, mask=present)
    tl.store(statistics.total + at, total, mask=present)


@triton.jit(do_not_specialize=["Tq", "Tk", "threshold"])
def _dq_kernel(
    dy,
    q,
    k,
    v,
    dq,
    statistics,
    lengths,
    seed_ptr,
    threshold,
    factor,
    Tq,
    Tk,
    group,
    scale,
    IS_CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    batch, q_begin, k_begin, first, q_count, whole, seen = query_tile(
        Tq, Tk, lengths, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    if first >= q_count:
        return
    i = first + tl.arange(0, BLOCK_M)
    present = i < q_count
    tokens = q_begin + i
    at = (batch * H + head) * Tq + tokens
    lse = load_lse(statistics, at, present)
    delta = tl.load(statistics.delta + at, mask=present, other=0.0)
    queries = load_tile(q, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    queries, late = scale_early(queries, scale)
    dys = load_tile(dy, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    if seed_ptr is not None:
        key0, key1 = dropout_keys(seed_ptr, batch, head, tokens, H, Tq, lengths.cu_q is not None)
    dqueries = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, seen, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, batch, head // group, k_begin + start, j < seen, D, BLOCK_N, BLOCK_D)
        values = load_tile(v, batch, head // group, k_begin + start, j < seen, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(queries, keys.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        p = exp_of(scores, late, lse[:, None], values.dtype)
        if start >= whole:
            p = tl.where(sees(i, j, seen, IS_CAUSAL), p, 0.0)
        dp = tl.dot(dys, values.T, input_precision="ieee")
        if seed_ptr is not None:
            keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
            dp = tl.where(keep, dp * factor, 0.0)
        ds = (p * (dp - delta[:, None])).to(keys.dtype)
        dqueries = tl.dot(ds, keys, dqueries, input_precision="ieee")

    dqueries *= scale
    store_tile(dqueries, dq, batch, head, q_begin + first, present, D)


@triton.jit(do_not_specialize=["Tq", "Tk", "threshold"])
def _dkdv_kernel(
    dy,
    q,
    k,
    v,
    dk,
    dv,
    statistics,
    lengths,
    seed_ptr,
    threshold,
    factor,
    Tq,
    Tk,
    group,
    scale,
    IS_CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    key_head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1) * group
    sequence, first = locate(tl.program_id(0), Tk, lengths.cu_k, BLOCK_N)
    batch, q_begin, q_count = extent(sequence, Tq, lengths.cu_q)
    k_begin, k_count, seen = key_extent(sequence, Tk, lengths)
    if first >= k_count:
        return
    j = first + tl.arange(0, BLOCK_N)
    # Queries before `begin` see no key of the tile; those from `whole` on see every one.
    begin = 0
    whole = 0
    if IS_CAUSAL:
        begin = first // BLOCK_M * BLOCK_M
        whole = first + BLOCK_N - 1
    end = tl.where(first < seen, q_count, 0)

    keys = load_tile(k, batch, key_head, k_begin + first, j < seen, D, BLOCK_N, BLOCK_D)
    values = load_tile(v, batch, key_head, k_begin + first, j < seen, D, BLOCK_N, BLOCK_D)
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(key_head * group, key_head * group + group):
        for start in range(begin, end, BLOCK_M):
            # An absent query is zero: it adds zero, and needs no mask.
            i = start + tl.arange(0, BLOCK_M)
            present = i < q_count
            tokens = q_begin + i
            at = (batch * H + head) * Tq + tokens
            lse = load_lse(statistics, at, present)
            delta = tl.load(statistics.delta + at, mask=present, other=0.0)
            queries = load_tile(q, batch, head, q_begin + start, present, D, BLOCK_M, BLOCK_D)
            queries, late = scale_early(queries, scale)
            dys = load_tile(dy, batch, head, q_begin + start, present, D, BLOCK_M, BLOCK_D)
            # Transposed, as dkeys and dvalues need P and dS: (BLOCK_N, BLOCK_M).
            scores = tl.dot(keys, queries.T, input_precision="ieee")
            p = exp_of(scores, late, lse[None, :], values.dtype)
            if statistics.total is not None:
                total = tl.load(statistics.total + at, mask=present, other=1.0)
                p = tl.div_rn(p, total[None, :])
            if start < whole:
                p = tl.where(j[:, None] <= i[None, :], p, 0.0)
            dp = tl.dot(values, dys.T, input_precision="ieee")
            kept = p
            if seed_ptr is not None:
                key0, key1 = dropout_keys(
                    seed_ptr, batch, head, tokens, H, Tq, lengths.cu_q is not None
                )
                keep = keep_mask(key0[None, :], key1[None, :], j[:, None], threshold)
                kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * factor, 0.0)
            dvalues = tl.dot(kept.to(dys.dtype), dys, dvalues, input_precision="ieee")
            ds = (p * (dp - delta[None, :])).to(queries.dtype)
            dkeys = tl.dot(ds, queries, dkeys, input_precision="ieee")

    if values.dtype != tl.float32:  # float32 queries were scaled early
        dkeys *= scale
    # A key past its length was read as zero, whose score is 0 rather than none.
    hidden = (j >= seen)[:, None]
    dkeys = tl.where(hidden, 0.0, dkeys)
    dvalues = tl.where(hidden, 0.0, dvalues * factor)
    store_tile(dkeys, dk, batch, key_head, k_begin + first, j < k_count, D)
    store_tile(dvalues, dv, batch, key_head, k_begin + first, j < k_count, D)
