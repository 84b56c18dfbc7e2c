"""The gradient of attention's bias in Triton: dS, summed over what the bias is broadcast over.

Tiling    A program owns a tile of the bias and walks the sequences, heads, queries and keys that
          read it, computing their dS again: two products a pair of tiles more than dq and dk, no
          atomics, one writer, the same bits on every run, and never a dS in memory that is larger
          than the bias. A bias of one row or one column is summed over that side of the tile.
          A bias with few tiles is read by many sequences, heads or queries: these are dealt out to
          several programs, whose float32 sums torch adds up.
Launch    grid = (its sequences * heads * tiles of its rows, tiles of its columns, shares)
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._attention import (
    keys_seen,
    load_beside,
    load_keys,
    load_queries,
    pairs_of,
    place_of,
    zeros,
)
from slimkernels.backends.triton._attention_launch import Prepared
from slimkernels.backends.triton._attention_scores import (
    added,
    dropped,
    dscores,
    load_known,
    probabilities,
)
from slimkernels.backends.triton._attention_terms import NUMBERS, Numbers, Tile

_PROGRAMS = 512  # that are enough; no GPU is asked how many it holds


def shares_of(given: Prepared, tile: Tile, programs: int) -> tuple[int, int]:
    """How many shares the sequences and heads that read a tile of the bias are dealt into, and how
    many the queries of each. programs  that one share of everything has"""
    shape, queries = given.call.bias.shape, 1
    wanted = triton.cdiv(_PROGRAMS, programs)
    planes = (given.sequences if shape[0] == 1 else 1) * (given.H if shape[1] == 1 else 1)
    planes = min(wanted, planes)
    if shape[2] == 1:
        Tq = triton.cdiv(given.Tq, given.sequences) if given.call.ragged else given.Tq
        queries = min(triton.cdiv(wanted, planes), triton.cdiv(Tq, tile.BLOCK_M))
    return planes, queries


@triton.jit(do_not_specialize=[*NUMBERS, "sequences", "plane_shares"])
def _dbias_kernel(
    x,
    dbias,
    statistics,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    sequences,
    H,
    plane_shares,
    ONES: tl.constexpr,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    tiles = tl.cdiv(dbias.queries, TILE.BLOCK_M)
    plane = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * TILE.BLOCK_M
    col = tl.program_id(1) * TILE.BLOCK_N
    first_head = 0
    heads = H
    first_sequence = plane
    if not ONES.HEAD:
        first_head = plane % H
        heads = 1
        first_sequence = plane // H
    of_sequence = 1
    if ONES.SEQUENCE:
        first_sequence = 0
        of_sequence = sequences
    plane_share = 0
    plane_step = 1
    if ONES.SEQUENCE | ONES.HEAD:  # else one plane, and a loop that the compiler removes
        plane_share = tl.program_id(2) % plane_shares
        plane_step = plane_shares
    query_step = TILE.BLOCK_M
    if ONES.QUERY:
        query_step = tl.num_programs(2) // plane_shares * TILE.BLOCK_M
    acc = zeros(TILE.BLOCK_M, TILE.BLOCK_N)
    for n in range(plane_share, of_sequence * heads, plane_step):
        head = tl.cast(first_head + n % heads, tl.int64)
        place = place_of(first_sequence + n // heads, terms, numbers)
        q_first = row
        q_end = tl.minimum(row + 1, place.q_count)
        if ONES.QUERY:
            q_first = tl.program_id(2) // plane_shares * TILE.BLOCK_M
            q_end = place.q_count
        k_first = col
        k_end = tl.minimum(col + 1, place.seen)
        if ONES.KEY:
            k_first = 0
            k_end = place.seen
        for start in range(q_first, q_end, query_step):
            queries = load_queries(x.q, head, H, start, place, terms, numbers, TILE, 1)
            dys = load_beside(x.dy, queries, head, place, TILE)
            known = load_known(statistics, queries, 1)
            span = keys_seen(start, TILE.BLOCK_M, place, FEATURES, TILE.BLOCK_N)
            first_key = tl.maximum(span.begin, k_first)
            end_key = tl.minimum(span.end, k_end)
            for first in range(first_key, end_key, TILE.BLOCK_N):
                key_head = head // terms.group
                keys = load_keys(x.k, key_head, first, place, TILE.D, TILE.BLOCK_N, TILE.BLOCK_D)
                values = load_keys(
                    x.v, key_head, first, place, TILE.DV, TILE.BLOCK_N, TILE.BLOCK_DV
                )
                pairs = pairs_of(queries, first, span, head, place, TILE.BLOCK_N)
                extra = added(pairs, terms.scoring, FEATURES)
                products = tl.dot(queries.q, keys.T, input_precision=FEATURES.PRECISION)
                p, outer, _ = probabilities(products, extra, queries, known, pairs, terms, FEATURES)
                dp = tl.dot(dys, values.T, input_precision=FEATURES.PRECISION)
                dp = dropped(dp, queries, pairs, terms.dropout.factor, terms, numbers)
                acc += dscores(p, dp, known, outer, terms)

    rows = row + tl.arange(0, TILE.BLOCK_M)
    cols = col + tl.arange(0, TILE.BLOCK_N)
    if ONES.QUERY:  # every row is stored to the same place, all with the same sum
        acc = tl.broadcast_to(tl.sum(acc, axis=0)[None, :], acc.shape)
        rows = rows * 0
    if ONES.KEY:
        acc = tl.broadcast_to(tl.sum(acc, axis=1)[:, None], acc.shape)
        cols = cols * 0
    inside = (rows < dbias.queries)[:, None] & (cols < dbias.keys)[None, :]
    plane += tl.program_id(2) * (tl.num_programs(0) // tiles)
    start = dbias.ptr + plane.to(tl.int64) * dbias.queries * dbias.keys
    at = rows.to(tl.int64)[:, None] * dbias.keys + cols[None, :]
    tl.store(start + at, acc.to(dbias.ptr.dtype.element_ty), mask=inside)
