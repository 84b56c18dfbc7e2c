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
    extent,
    key_tile,
    load_beside,
    load_keys,
    load_queries,
    load_tile,
    locate,
    pairs_of,
    query_tile,
    store_tile,
    zeros,
)
from slimkernels.backends.triton._attention_scores import (
    added,
    bucket_of,
    dropped,
    dscores,
    load_known,
    load_lse,
    probabilities,
)
from slimkernels.backends.triton._attention_terms import NUMBERS, Known, Numbers, Pairs


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    x, statistics, T, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """delta = rowsum(dy * y) - dlse. A sum needs no boundaries: all ragged tokens are one
    sequence."""
    head = tl.program_id(1).to(tl.int64)
    sequence, first = locate(tl.program_id(0), tl.num_programs(0), T, None, BLOCK_M)
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


@triton.jit(do_not_specialize=NUMBERS)
def _row_sums_kernel(
    x,
    statistics,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums over all keys of P, which would be 1 if P came from more than lse, and delta."""
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    head = tl.program_id(1).to(tl.int64)
    place, first, span = query_tile(terms, numbers, FEATURES, TILE)
    if first >= place.q_count:
        return
    H = tl.num_programs(1)
    queries = load_queries(x.q, head, H, first, place, terms, numbers, TILE, 1)
    dys = load_beside(x.dy, queries, head, place, TILE)
    ys = load_beside(x.y, queries, head, place, TILE)
    lse, low = load_lse(statistics, queries)
    # Nearly delta already; what it lacks is small, and so is the rounding of that.
    delta = tl.sum(dys * ys, axis=1)
    known = Known(lse[:, None], low[:, None], delta[:, None], None)
    total = tl.zeros_like(delta)
    if terms.scoring.sinks is not None:  # a key whose dP is 0
        total = tl.exp((tl.load(terms.scoring.sinks + head).to(tl.float32) - lse) - low)
    lacking = -delta * total
    for start in range(span.begin, span.end, TILE.BLOCK_N):
        key_head = head // terms.group
        keys = load_keys(x.k, key_head, start, place, TILE.D, TILE.BLOCK_N, TILE.BLOCK_D)
        values = load_keys(x.v, key_head, start, place, TILE.DV, TILE.BLOCK_N, TILE.BLOCK_DV)
        pairs = pairs_of(queries, start, span, head, place, TILE.BLOCK_N)
        extra = added(pairs, terms.scoring, FEATURES)
        products = tl.dot(queries.q, keys.T, input_precision=FEATURES.PRECISION)
        p, _, _ = probabilities(products, extra, queries, known, pairs, terms, FEATURES)
        dp = tl.dot(dys, values.T, input_precision=FEATURES.PRECISION)
        dp = dropped(dp, queries, pairs, terms.dropout.factor, terms, numbers)
        total += tl.sum(p, axis=1)
        lacking += tl.sum(p * (dp - known.delta), axis=1)

    total = tl.where(total == 0.0, 1.0, total)  # no key, or only scores of -inf
    delta += lacking / total
    if statistics.dlse is not None:
        delta -= tl.load(statistics.dlse + queries.at, mask=queries.present, other=0.0)
    tl.store(statistics.delta + queries.at, delta, mask=queries.present)
    tl.store(statistics.total + queries.at, total, mask=queries.present)


@triton.jit(do_not_specialize=NUMBERS)
def _dq_kernel(
    x,
    dq,
    statistics,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TABLE: tl.constexpr,
):
    """dq, and in statistics.dtable the tile's share of a relative bias's gradient."""
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    head = tl.program_id(1).to(tl.int64)
    place, first, span = query_tile(terms, numbers, FEATURES, TILE)
    if first >= place.q_count:
        return
    H = tl.num_programs(1)
    queries = load_queries(x.q, head, H, first, place, terms, numbers, TILE, 1)
    dys = load_beside(x.dy, queries, head, place, TILE)
    known = load_known(statistics, queries, 1)
    dqueries = zeros(TILE.BLOCK_M, TILE.BLOCK_D)
    if statistics.dtable is not None:
        dtable = tl.zeros((BLOCK_TABLE,), tl.float32)
    for start in range(span.begin, span.end, TILE.BLOCK_N):
        key_head = head // terms.group
        keys = load_keys(x.k, key_head, start, place, TILE.D, TILE.BLOCK_N, TILE.BLOCK_D)
        values = load_keys(x.v, key_head, start, place, TILE.DV, TILE.BLOCK_N, TILE.BLOCK_DV)
        pairs = pairs_of(queries, start, span, head, place, TILE.BLOCK_N)
        extra = added(pairs, terms.scoring, FEATURES)
        products = tl.dot(queries.q, keys.T, input_precision=FEATURES.PRECISION)
        p, outer, inner = probabilities(products, extra, queries, known, pairs, terms, FEATURES)
        dp = tl.dot(dys, values.T, input_precision=FEATURES.PRECISION)
        dp = dropped(dp, queries, pairs, terms.dropout.factor, terms, numbers)
        ds = dscores(p, dp, known, outer, terms)
        if statistics.dtable is not None:
            dtable = with_shares(dtable, ds, pairs, terms.scoring.table, BLOCK_TABLE)
        ds = (ds * inner).to(keys.dtype)
        dqueries = tl.dot(ds, keys, dqueries, input_precision=FEATURES.PRECISION)

    dqueries *= terms.scoring.scale
    store_tile(dqueries, dq, place.batch, head, queries.token, queries.present, TILE.D)
    if statistics.dtable is not None:
        share = tl.program_id(0).to(tl.int64) * H + head
        tl.store(statistics.dtable + share * BLOCK_TABLE + tl.arange(0, BLOCK_TABLE), dtable)


@triton.jit
def with_shares(dtable, ds, pairs, table, BLOCK_TABLE: tl.constexpr):
    """dtable and, of a relative bias's buckets, each one's dS."""
    rows = tl.arange(0, BLOCK_TABLE)
    buckets = bucket_of(table, pairs.j - (pairs.i + pairs.place.offset))
    # A tile's buckets are few but near the diagonal, where it has them all.
    lowest = tl.min(buckets)
    highest = tl.max(buckets)
    for bucket in range(lowest, highest + 1):
        share = tl.sum(tl.where(buckets == bucket, ds, 0.0))
        dtable += tl.where(rows == bucket, share, 0.0)
    return dtable


@triton.jit(do_not_specialize=NUMBERS)
def _dkdv_kernel(
    x,
    dk,
    dv,
    statistics,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    key_head = tl.program_id(1).to(tl.int64)
    place, first, span = key_tile(terms, numbers, FEATURES, TILE)
    if first >= place.k_count:
        return
    group = terms.group
    H = tl.num_programs(1) * group
    j = first + tl.arange(0, TILE.BLOCK_N)
    keys = load_keys(x.k, key_head, first, place, TILE.D, TILE.BLOCK_N, TILE.BLOCK_D)
    values = load_keys(x.v, key_head, first, place, TILE.DV, TILE.BLOCK_N, TILE.BLOCK_DV)
    dkeys = zeros(TILE.BLOCK_N, TILE.BLOCK_D)
    dvalues = zeros(TILE.BLOCK_N, TILE.BLOCK_DV)
    for head in range(key_head * group, key_head * group + group):
        for start in range(span.begin, span.end, TILE.BLOCK_M):
            # An absent query has P = 0: it adds zero, and needs no mask.
            queries = load_queries(x.q, head, H, start, place, terms, numbers, TILE, 0)
            dys = load_beside(x.dy, queries, head, place, TILE)
            known = load_known(statistics, queries, 0)
            edge = start < span.whole_begin
            if FEATURES.HAS_LEFT:
                edge = edge | (start + TILE.BLOCK_M > span.whole_end)
            # Transposed, as dkeys and dvalues need P and dS: (BLOCK_N, BLOCK_M).
            pairs = Pairs(queries.i, j[:, None], head, place, edge)
            extra = added(pairs, terms.scoring, FEATURES)
            products = tl.dot(keys, queries.q.T, input_precision=FEATURES.PRECISION)
            p, outer, inner = probabilities(products, extra, queries, known, pairs, terms, FEATURES)
            dp = tl.dot(values, dys.T, input_precision=FEATURES.PRECISION)
            dp = dropped(dp, queries, pairs, terms.dropout.factor, terms, numbers)
            kept = dropped(p, queries, pairs, 1.0, terms, numbers).to(dys.dtype)
            dvalues = tl.dot(kept, dys, dvalues, input_precision=FEATURES.PRECISION)
            ds = (dscores(p, dp, known, outer, terms) * inner).to(keys.dtype)
            dkeys = tl.dot(ds, queries.q, dkeys, input_precision=FEATURES.PRECISION)

    if values.dtype != tl.float32:  # float32 queries were scaled early
        dkeys *= terms.scoring.scale
    # A key past its length was read as zero, whose score is 0 rather than none.
    hidden = (j >= place.seen)[:, None]
    dkeys = tl.where(hidden, 0.0, dkeys)
    dvalues = tl.where(hidden, 0.0, dvalues * terms.dropout.factor)
    token = place.k_begin + first
    store_tile(dkeys, dk, place.batch, key_head, token, j < place.k_count, TILE.D)
    store_tile(dvalues, dv, place.batch, key_head, token, j < place.k_count, TILE.DV)
