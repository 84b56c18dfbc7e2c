"""The gradients of attention in Triton; scaled_dot_product_attention.py launches them.

With P the probabilities, P' the same after dropout and dP = dropout's gradient of dy @ v^T:

    dv = P'^T @ dy    dS = P * (dP - delta)    dq = scale * dS @ k    dk = scale * dS^T @ q
    delta = rowsum(P * dP) - dlse = rowsum(dy * y) - dlse

Where a call changes the scores, dS is multiplied by the derivative of that on its way to dq and dk.

Tiling    dq: a program owns BLOCK_M queries and walks the keys. dk, dv: a program owns BLOCK_N keys
          of one key head and walks the queries of every head that reads it. Each result has one
          writer: no atomics and the same bits on every run, for seven products a pair of tiles
          where adding dq up in memory would take five.
Numerics  P comes from lse, one float32, and delta from the rounded y. In 16 bits that is below
          eager's own rounding. In float32 it is not where scores are large: exp(score - lse) is off
          by the rounding of lse, 2e-5 at 300. So float32 pays two more products for the sums of P,
          by which all gradients divide it, and for delta from P and dP themselves, whose roundings
          cancel.
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._attention import (
    dropout_keys,
    extent,
    key_tile,
    load_tile,
    locate,
    query_tile,
    store_tile,
)
from slimkernels.backends.triton._attention_scores import (
    added,
    bucket_of,
    load_lse,
    modified,
    probability,
    scale_early,
    shown,
    through,
)
from slimkernels.backends.triton._common import keep_mask


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    x, statistics, T, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """delta = rowsum(dy * y) - dlse. A sum needs no boundaries: all ragged tokens are one
    sequence."""
    head = tl.program_id(1).to(tl.int64)
    sequence, first = locate(tl.program_id(0), T, None, BLOCK_M)
    batch, begin, _ = extent(sequence, T, None)
    tokens = begin + first + tl.arange(0, BLOCK_M)
    present = tokens < T
    at = (batch * tl.num_programs(1) + head) * T + tokens
    dys = load_tile(x.dy, batch, head, begin + first, present, DV, BLOCK_M, BLOCK_DV)
    ys = load_tile(x.y, batch, head, begin + first, present, DV, BLOCK_M, BLOCK_DV)
    delta = tl.sum(dys.to(tl.float32) * ys.to(tl.float32), axis=1)
    if statistics.dlse is not None:
        delta -= tl.load(statistics.dlse + at, mask=present, other=0.0)
    tl.store(statistics.delta + at, delta, mask=present)


@triton.jit(do_not_specialize=["threshold", "Tq", "Tk", "left", "right", "offset"])
def _row_sums_kernel(
    x,
    statistics,
    lengths,
    scoring,
    dropout,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    group,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MODIFIED: tl.constexpr,
    MASKED: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The sums over all keys of P, which would be 1 if P came from more than lse, and delta."""
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    where, keys_seen, first, q_count = query_tile(
        Tq, Tk, left, right, offset, lengths, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if first >= q_count:
        return
    sequence, batch, q_begin, k_begin, offset = where
    begin, end, whole_begin, whole_end, seen = keys_seen
    place = (sequence, head, offset, left, right, q_count, seen)
    i = first + tl.arange(0, BLOCK_M)
    present = i < q_count
    tokens = q_begin + i
    at = (batch * H + head) * Tq + tokens
    lse, low = load_lse(statistics, at, present)
    queries = load_tile(x.q, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    queries, late = scale_early(queries, scoring.scale)
    dys = load_tile(x.dy, batch, head, q_begin + first, present, DV, BLOCK_M, BLOCK_DV)
    if dropout.seed is not None:
        key0, key1 = dropout_keys(dropout, batch, head, tokens, H, Tq, lengths)
    ys = load_tile(x.y, batch, head, q_begin + first, present, DV, BLOCK_M, BLOCK_DV)
    # Nearly delta already; what it lacks is small, and so is the rounding of that.
    delta = tl.sum(dys * ys, axis=1)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if scoring.sinks is not None:  # a key whose dP is 0
        total = tl.exp((tl.load(scoring.sinks + head).to(tl.float32) - lse) - low)
    lacking = -delta * total
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        here = j < seen
        keys = load_tile(x.k, batch, head // group, k_begin + start, here, D, BLOCK_N, BLOCK_D)
        values = load_tile(x.v, batch, head // group, k_begin + start, here, DV, BLOCK_N, BLOCK_DV)
        if MODIFIED:
            extra = added(i[:, None], j[None, :], place, scoring)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MODIFIED:
            scores, outer, inner = modified(
                scores, late, extra, i[:, None], j[None, :], place, scoring, SCORE, None
            )
        p = probability(scores, late, lse[:, None], low[:, None], MODIFIED, values.dtype)
        edge = (start < whole_begin) | (start + BLOCK_N > whole_end)
        p = shown(
            p,
            0.0,
            i[:, None],
            j[None, :],
            edge,
            place,
            scoring,
            HAS_LEFT,
            HAS_RIGHT,
            MASKED,
            MASK,
            True,
        )
        dp = tl.dot(dys, values.T, input_precision=PRECISION)
        if dropout.seed is not None:
            keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
            dp = tl.where(keep, dp * dropout.factor, 0.0)
        total += tl.sum(p, axis=1)
        lacking += tl.sum(p * (dp - delta[:, None]), axis=1)

    total = tl.where(total == 0.0, 1.0, total)  # no key, or only scores of -inf
    delta += lacking / total
    if statistics.dlse is not None:
        delta -= tl.load(statistics.dlse + at, mask=present, other=0.0)
    tl.store(statistics.delta + at, delta, mask=present)
    tl.store(statistics.total + at, total, mask=present)


@triton.jit(do_not_specialize=["threshold", "Tq", "Tk", "left", "right", "offset"])
def _dq_kernel(
    x,
    dq,
    statistics,
    lengths,
    scoring,
    dropout,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    group,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MODIFIED: tl.constexpr,
    MASKED: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_TABLE: tl.constexpr,
):
    """dq, and in statistics.dtable the tile's share of a relative bias's gradient."""
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    where, keys_seen, first, q_count = query_tile(
        Tq, Tk, left, right, offset, lengths, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if first >= q_count:
        return
    sequence, batch, q_begin, k_begin, offset = where
    begin, end, whole_begin, whole_end, seen = keys_seen
    place = (sequence, head, offset, left, right, q_count, seen)
    i = first + tl.arange(0, BLOCK_M)
    present = i < q_count
    tokens = q_begin + i
    at = (batch * H + head) * Tq + tokens
    lse, low = load_lse(statistics, at, present)
    delta = tl.load(statistics.delta + at, mask=present, other=0.0)
    if statistics.total is not None:
        total = tl.load(statistics.total + at, mask=present, other=1.0)
    queries = load_tile(x.q, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    queries, late = scale_early(queries, scoring.scale)
    dys = load_tile(x.dy, batch, head, q_begin + first, present, DV, BLOCK_M, BLOCK_DV)
    if dropout.seed is not None:
        key0, key1 = dropout_keys(dropout, batch, head, tokens, H, Tq, lengths)
    dqueries = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if statistics.dtable is not None:
        rows = tl.arange(0, BLOCK_TABLE)
        dtable = tl.zeros((BLOCK_TABLE,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        here = j < seen
        keys = load_tile(x.k, batch, head // group, k_begin + start, here, D, BLOCK_N, BLOCK_D)
        values = load_tile(x.v, batch, head // group, k_begin + start, here, DV, BLOCK_N, BLOCK_DV)
        if MODIFIED:
            extra = added(i[:, None], j[None, :], place, scoring)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if MODIFIED:
            scores, outer, inner = modified(
                scores, late, extra, i[:, None], j[None, :], place, scoring, SCORE, DERIVATIVE
            )
        p = probability(scores, late, lse[:, None], low[:, None], MODIFIED, values.dtype)
        edge = (start < whole_begin) | (start + BLOCK_N > whole_end)
        p = shown(
            p,
            0.0,
            i[:, None],
            j[None, :],
            edge,
            place,
            scoring,
            HAS_LEFT,
            HAS_RIGHT,
            MASKED,
            MASK,
            True,
        )
        if statistics.total is not None:
            p = tl.div_rn(p, total[:, None])
        dp = tl.dot(dys, values.T, input_precision=PRECISION)
        if dropout.seed is not None:
            keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
            dp = tl.where(keep, dp * dropout.factor, 0.0)
        ds = p * (dp - delta[:, None])
        if MODIFIED:
            ds = through(ds, p, outer, DERIVATIVE)
            if statistics.dtable is not None:
                # A tile's buckets are few but near the diagonal, where it has them all.
                buckets = bucket_of(scoring.table, j[None, :] - (i + offset)[:, None])
                lowest = tl.min(buckets)
                highest = tl.max(buckets)
                for bucket in range(lowest, highest + 1):
                    share = tl.sum(tl.where(buckets == bucket, ds, 0.0))
                    dtable += tl.where(rows == bucket, share, 0.0)
            ds *= inner
        dqueries = tl.dot(ds.to(keys.dtype), keys, dqueries, input_precision=PRECISION)

    dqueries *= scoring.scale
    store_tile(dqueries, dq, batch, head, q_begin + first, present, D)
    if statistics.dtable is not None:
        share = tl.program_id(0).to(tl.int64) * H + head
        tl.store(statistics.dtable + share * BLOCK_TABLE + rows, dtable)


@triton.jit(do_not_specialize=["threshold", "Tq", "Tk", "left", "right", "offset"])
def _dkdv_kernel(
    x,
    dk,
    dv,
    statistics,
    lengths,
    scoring,
    dropout,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    group,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MODIFIED: tl.constexpr,
    MASKED: tl.constexpr,
    SCORE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    key_head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1) * group
    where, queries_seeing, first, k_count, q_count, seen = key_tile(
        Tq, Tk, left, right, offset, lengths, HAS_LEFT, HAS_RIGHT, BLOCK_M, BLOCK_N
    )
    if first >= k_count:
        return
    sequence, batch, q_begin, k_begin, offset = where
    begin, end, whole_begin, whole_end = queries_seeing
    j = first + tl.arange(0, BLOCK_N)
    keys = load_tile(x.k, batch, key_head, k_begin + first, j < seen, D, BLOCK_N, BLOCK_D)
    values = load_tile(x.v, batch, key_head, k_begin + first, j < seen, DV, BLOCK_N, BLOCK_DV)
    dkeys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for head in range(key_head * group, key_head * group + group):
        place = (sequence, head, offset, left, right, q_count, seen)
        for start in range(begin, end, BLOCK_M):
            # An absent query has P = 0: it adds zero, and needs no mask.
            i = start + tl.arange(0, BLOCK_M)
            present = i < q_count
            tokens = q_begin + i
            at = (batch * H + head) * Tq + tokens
            lse, low = load_lse(statistics, at, present)
            delta = tl.load(statistics.delta + at, mask=present, other=0.0)
            queries = load_tile(x.q, batch, head, q_begin + start, present, D, BLOCK_M, BLOCK_D)
            queries, late = scale_early(queries, scoring.scale)
            dys = load_tile(x.dy, batch, head, q_begin + start, present, DV, BLOCK_M, BLOCK_DV)
            # Transposed, as dkeys and dvalues need P and dS: (BLOCK_N, BLOCK_M).
            if MODIFIED:
                extra = added(i[None, :], j[:, None], place, scoring)
            scores = tl.dot(keys, queries.T, input_precision=PRECISION)
            if MODIFIED:
                scores, outer, inner = modified(
                    scores, late, extra, i[None, :], j[:, None], place, scoring, SCORE, DERIVATIVE
                )
            p = probability(scores, late, lse[None, :], low[None, :], MODIFIED, values.dtype)
            if statistics.total is not None:
                total = tl.load(statistics.total + at, mask=present, other=1.0)
                p = tl.div_rn(p, total[None, :])
            edge = start < whole_begin
            if HAS_LEFT:
                edge = edge | (start + BLOCK_M > whole_end)
            p = shown(
                p,
                0.0,
                i[None, :],
                j[:, None],
                edge,
                place,
                scoring,
                HAS_LEFT,
                HAS_RIGHT,
                MASKED,
                MASK,
                False,
            )
            dp = tl.dot(values, dys.T, input_precision=PRECISION)
            kept = p
            if dropout.seed is not None:
                key0, key1 = dropout_keys(dropout, batch, head, tokens, H, Tq, lengths)
                keep = keep_mask(key0[None, :], key1[None, :], j[:, None], threshold)
                kept = tl.where(keep, p, 0.0)
                dp = tl.where(keep, dp * dropout.factor, 0.0)
            dvalues = tl.dot(kept.to(dys.dtype), dys, dvalues, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            if MODIFIED:
                ds = through(ds, p, outer, DERIVATIVE) * inner
            dkeys = tl.dot(ds.to(queries.dtype), queries, dkeys, input_precision=PRECISION)

    if values.dtype != tl.float32:  # float32 queries were scaled early
        dkeys *= scoring.scale
    # A key past its length was read as zero, whose score is 0 rather than none.
    hidden = (j >= seen)[:, None]
    dkeys = tl.where(hidden, 0.0, dkeys)
    dvalues = tl.where(hidden, 0.0, dvalues * dropout.factor)
    store_tile(dkeys, dk, batch, key_head, k_begin + first, j < k_count, D)
    store_tile(dvalues, dv, batch, key_head, k_begin + first, j < k_count, DV)
