"""What attention's kernels share: their operands, where in them a tile lies, and its arithmetic.

B sequences, H heads, T tokens, D head width. Sequences come dense, in (B, H, T, D), or ragged, one
after the other in (T, H, D) with their boundaries in cu_seqlens. A kernel sees both as tokens of
one head of a batch row; all ragged ones lie in row 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from slimkernels.backends.triton._common import row_keys

LOG2E = tl.constexpr(1.4426950408889634)
# Where a query's maximum starts, and stays if all its scores are -inf: exp(-inf - LOWEST) is 0, and
# exp(-inf + inf) would be NaN. About the lowest float32 whose product with LOG2E is one, too.
LOWEST = tl.constexpr(-2.3e38)


class Rows(NamedTuple):
    """An operand whose rows are the D elements of one token and head, and its strides."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


class Lengths(NamedTuple):
    """Pointers, or None: (B,) how many keys a dense sequence has; (B + 1,) ragged boundaries."""

    keys: Any
    cu_q: Any
    cu_k: Any


class Statistics(NamedTuple):
    """Pointers to one float32 a query and head; `total` is None where P is taken to sum to 1."""

    lse: Any
    delta: Any
    total: Any


def rows_of(x):
    """x (B, H, T, D), or (T, H, D) if ragged; the elements of a row must be neighbours."""
    return Rows(x, *x.stride()[:3]) if x.dim() == 4 else Rows(x, 0, x.stride(1), x.stride(0))


def tiles_of(x, cu_seqlens, BLOCK):
    """How many tiles of BLOCK tokens cover every sequence of x; locate() is the way back.

    The host does not know the ragged lengths, and asking would make it wait. So sequence b has the
    tiles from cu_seqlens[b] // BLOCK + b up to those of b + 1: at least the ceil(length / BLOCK)
    that it needs, because rounding down takes less than the tile that + b gives. The number of all
    needs only T and B; at most one tile a sequence is left over, and returns at once.
    """
    if cu_seqlens is None:
        return x.shape[0] * triton.cdiv(x.shape[2], BLOCK)
    sequences = cu_seqlens.shape[0] - 1
    return x.shape[0] // BLOCK + sequences if sequences else 0


@triton.jit
def locate(tile, T, cu_ptr, BLOCK: tl.constexpr):
    """The sequence that a tile of tiles_of() is in, and the tile's first token there.

    On a GPU nobody has checked the boundaries. Whatever they are, memory stays safe: here the
    sequence exists and the token is not negative, and extent() keeps begin and count within T.
    """
    if cu_ptr is None:
        per_sequence = tl.cdiv(T, BLOCK)
        sequence = tile // per_sequence
        first = (tile % per_sequence) * BLOCK
    else:
        # Counting the sequences whose tiles start no later is one load for 128 of them; a
        # bisection would wait for seven, one after the other.
        B = tl.num_programs(0) - T // BLOCK
        sequence = -1
        for start in range(0, B, 128):
            b = start + tl.arange(0, 128)
            starts = tl.load(cu_ptr + b, mask=b < B, other=0) // BLOCK + b
            sequence += tl.sum(((b < B) & (starts <= tile)).to(tl.int32), axis=0)
        sequence = tl.maximum(sequence, 0)
        first = (tile - sequence - tl.load(cu_ptr + sequence) // BLOCK) * BLOCK
        first = tl.maximum(first, 0)  # after the product, which may overflow
    return sequence, first


@triton.jit
def extent(sequence, T, cu_ptr):
    """A sequence's batch row, its first token there (both int64), and how many it has."""
    if cu_ptr is None:
        batch = sequence.to(tl.int64)
        begin = batch * 0
        count = T
    else:
        low = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence), 0), T)
        count = tl.minimum(tl.maximum(tl.load(cu_ptr + sequence + 1), low), T) - low
        begin = low.to(tl.int64)
        batch = begin * 0
    return batch, begin, count


@triton.jit
def key_extent(sequence, Tk, lengths):
    """The first key of a sequence, how many there are, and how many of those are seen."""
    _, begin, count = extent(sequence, Tk, lengths.cu_k)
    seen = count
    if lengths.keys is not None:
        seen = tl.minimum(tl.maximum(tl.load(lengths.keys + sequence), 0), Tk)
    return begin, count, seen


@triton.jit
def query_tile(
    Tq, Tk, lengths, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What a program that owns BLOCK_M queries must know.

    batch, q_begin, k_begin  where its sequence starts
    first, q_count           the first of its queries within the sequence, and where that ends
    whole, seen              keys before `whole`, a multiple of BLOCK_N, are seen by every query of
                             the tile; those from `seen` on by none
    """
    tile = tl.program_id(0)
    if IS_CAUSAL:  # the last tiles see most keys: they start first
        tile = tl.num_programs(0) - 1 - tile
    sequence, first = locate(tile, Tq, lengths.cu_q, BLOCK_M)
    batch, q_begin, q_count = extent(sequence, Tq, lengths.cu_q)
    k_begin, _, seen = key_extent(sequence, Tk, lengths)
    whole = seen
    if IS_CAUSAL:
        whole = tl.minimum(first + 1, seen)
        seen = tl.minimum(first + BLOCK_M, seen)
    return batch, q_begin, k_begin, first, q_count, whole // BLOCK_N * BLOCK_N, seen


@triton.jit
def _tile(x, batch, head, token, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to BLOCK tokens of one head from `token` on, (BLOCK, BLOCK_D)."""
    start = x.ptr + (batch * x.batch + head * x.head + token * x.token)
    tokens = tl.arange(0, BLOCK).to(tl.int64)
    return start + (tokens[:, None] * x.token + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def load_tile(
    x, batch, head, token, present, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """BLOCK tokens of a head from `token` on, zeros where not `present` and past D."""
    mask = present[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D)
    return tl.load(_tile(x, batch, head, token, BLOCK, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def store_tile(tile, x, batch, head, token, present, D: tl.constexpr):
    mask = present[:, None] & (tl.arange(0, tile.shape[1])[None, :] < D)
    at = _tile(x, batch, head, token, tile.shape[0], tile.shape[1])
    tl.store(at, tile.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def sees(i, j, seen, IS_CAUSAL: tl.constexpr):
    """Which queries i see which keys j, (BLOCK_M, BLOCK_N): the mask of tiles from `whole` on."""
    visible = (j < seen)[None, :]
    if IS_CAUSAL:
        visible = visible & (j[None, :] <= i[:, None])
    return visible


@triton.jit
def scale_early(queries, scale):
    """float32 queries times scale, whose scores then lack nothing: (queries, 1).

    Scores that are float32 numbers themselves cancel exactly against their maximum and lse; a
    scale applied to them would leave its rounding error. 16-bit queries it would round, so they
    stay: (queries, scale).
    """
    if queries.dtype == tl.float32:
        early = queries * scale
        late = 1.0
    else:
        early = queries
        late = scale
    return early, late


@triton.jit
def load_lse(statistics, at, present):
    """lse; LOWEST for a query that sees nothing, whose P are then 0."""
    return tl.maximum(tl.load(statistics.lse + at, mask=present, other=0.0), LOWEST)


@triton.jit
def exp_of(scores, late, shift, dtype: tl.constexpr):
    """exp(scores * late - shift), where `late` is scale_early's."""
    if dtype == tl.float32:
        p = tl.exp(scores - shift)
    else:  # one FMA and one exp2
        p = tl.exp2(tl.fma(scores, late * LOG2E, -shift * LOG2E))
    return p


@triton.jit
def dropout_keys(seed_ptr, batch, head, tokens, H, Tq, RAGGED: tl.constexpr):
    """row_keys of queries, numbered as in ops/scaled_dot_product_attention.py, _pairs."""
    rows = tokens * H + head if RAGGED else (batch * H + head) * Tq + tokens
    return row_keys(seed_ptr, rows)
