"""The gradient of attention's bias in Triton: dS, summed over what the bias is broadcast over.

Tiling    A program owns a tile of the bias and walks the sequences, heads, queries and keys that
          read it, computing their dS again: two products a pair of tiles more than dq and dk, no
          atomics, one writer, the same bits on every run, and never a dS in memory that is larger
          than the bias. A bias of one row or one column is summed over that side of the tile.
Launch    grid = (its sequences * heads * tiles of its rows, tiles of its columns)
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._attention import (
    dropout_keys,
    extent,
    key_extent,
    load_offset,
    load_tile,
)
from slimkernels.backends.triton._attention_scores import (
    added,
    load_lse,
    modified,
    probability,
    scale_early,
    sees,
    through,
)
from slimkernels.backends.triton._common import keep_mask


@triton.jit(do_not_specialize=["threshold", "Tq", "Tk", "left", "right", "offset", "sequences"])
def _dbias_kernel(
    x,
    dbias,
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
    sequences,
    H,
    ONE_SEQUENCE: tl.constexpr,
    ONE_HEAD: tl.constexpr,
    ONE_QUERY: tl.constexpr,
    ONE_KEY: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
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
    """ONE_...  the bias has one of these, which all of them read."""
    tiles = tl.cdiv(dbias.queries, BLOCK_M)
    plane = tl.program_id(0) // tiles
    row = tl.program_id(0) % tiles * BLOCK_M
    col = tl.program_id(1) * BLOCK_N
    first_head = 0
    heads = H
    first_sequence = plane
    if not ONE_HEAD:
        first_head = plane % H
        heads = 1
        first_sequence = plane // H
    of_sequence = 1
    if ONE_SEQUENCE:
        first_sequence = 0
        of_sequence = sequences
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(0, of_sequence * heads):
        sequence = first_sequence + n // heads
        head = tl.cast(first_head + n % heads, tl.int64)
        batch, q_begin, q_count = extent(sequence, Tq, lengths.cu_q)
        k_begin, _, seen = key_extent(sequence, Tk, lengths)
        if lengths.offsets is not None:
            offset = load_offset(lengths, sequence)
        place = (sequence, head, offset, left, right, q_count, seen)
        q_first = row
        q_end = tl.minimum(row + 1, q_count)
        if ONE_QUERY:
            q_first = 0
            q_end = q_count
        k_first = col
        k_end = tl.minimum(col + 1, seen)
        if ONE_KEY:
            k_first = 0
            k_end = seen
        for start in range(q_first, q_end, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            present = i < q_count
            tokens = q_begin + i
            at = (batch * H + head) * Tq + tokens
            lse, low = load_lse(statistics, at, present)
            delta = tl.load(statistics.delta + at, mask=present, other=0.0)
            if statistics.total is not None:
                total = tl.load(statistics.total + at, mask=present, other=1.0)
            queries = load_tile(x.q, batch, head, q_begin + start, present, D, BLOCK_M, BLOCK_D)
            queries, late = scale_early(queries, scoring.scale)
            dys = load_tile(x.dy, batch, head, q_begin + start, present, DV, BLOCK_M, BLOCK_DV)
            first_key = k_first
            end_key = k_end
            if HAS_RIGHT:  # the last key that one of these queries sees
                end_key = tl.minimum(start + BLOCK_M + (offset + right), k_end)
            if HAS_LEFT:
                first_key = tl.maximum((start + (offset - left)) // BLOCK_N * BLOCK_N, k_first)
            for first in range(first_key, end_key, BLOCK_N):
                j = first + tl.arange(0, BLOCK_N)
                here = j < seen
                token = k_begin + first
                keys = load_tile(x.k, batch, head // group, token, here, D, BLOCK_N, BLOCK_D)
                values = load_tile(x.v, batch, head // group, token, here, DV, BLOCK_N, BLOCK_DV)
                extra = added(i[:, None], j[None, :], place, scoring)
                scores = tl.dot(queries, keys.T, input_precision=PRECISION)
                scores, outer, inner = modified(
                    scores, late, extra, i[:, None], j[None, :], place, scoring, SCORE, DERIVATIVE
                )
                p = probability(scores, late, lse[:, None], low[:, None], True, values.dtype)
                visible = present[:, None] & sees(
                    i[:, None], j[None, :], place, scoring, HAS_LEFT, HAS_RIGHT, MASK, True
                )
                p = tl.where(visible, p, 0.0)
                if statistics.total is not None:
                    p = tl.div_rn(p, total[:, None])
                dp = tl.dot(dys, values.T, input_precision=PRECISION)
                if dropout.seed is not None:
                    key0, key1 = dropout_keys(dropout, batch, head, tokens, H, Tq, lengths)
                    keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
                    dp = tl.where(keep, dp * dropout.factor, 0.0)
                acc += through(p * (dp - delta[:, None]), p, outer, DERIVATIVE)

    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    if ONE_QUERY:  # every row is stored to the same place, all with the same sum
        acc = tl.broadcast_to(tl.sum(acc, axis=0)[None, :], (BLOCK_M, BLOCK_N))
        rows = rows * 0
    if ONE_KEY:
        acc = tl.broadcast_to(tl.sum(acc, axis=1)[:, None], (BLOCK_M, BLOCK_N))
        cols = cols * 0
    inside = (rows < dbias.queries)[:, None] & (cols < dbias.keys)[None, :]
    start = dbias.ptr + plane.to(tl.int64) * dbias.queries * dbias.keys
    at = rows.to(tl.int64)[:, None] * dbias.keys + cols[None, :]
    tl.store(start + at, acc.to(dbias.ptr.dtype.element_ty), mask=inside)
