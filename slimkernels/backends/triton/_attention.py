"""What attention's kernels share: their operands, where in them a tile lies, and its arithmetic.

B sequences, H heads, T tokens, D head width. Sequences come dense, in (B, H, T, D), or ragged, one
after the other in (T, H, D) with their boundaries in cu_seqlens. A kernel sees both as tokens of
one head of a batch row; all ragged ones lie in row 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from slimkernels.backends.triton._common import row_keys


class Rows(NamedTuple):
    """An operand whose rows are the D elements of one token and head, and its strides."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


class Operands(NamedTuple):
    """What a kernel reads, as Rows."""

    q: Any
    k: Any
    v: Any
    dy: Any = None
    y: Any = None


class Lengths(NamedTuple):
    """Pointers, or None: (B,) how many keys a dense sequence has; (B + 1,) ragged boundaries; (B,)
    what is added to the positions of a sequence's queries."""

    keys: Any
    cu_q: Any
    cu_k: Any
    offsets: Any


class Dropout(NamedTuple):
    """A pointer to the seed, or None, and what survivors are multiplied by."""

    seed: Any
    factor: Any


class Statistics(NamedTuple):
    """Pointers to one float32 a query and head; `total` is None where P is taken to sum to 1.

    dtable  (tiles, H, 2^n) float32: each tile's share of a relative bias's gradient; or None
    """

    lse: Any
    low: Any  # what lse lacks
    delta: Any
    total: Any
    dlse: Any
    dtable: Any


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
def load_offset(lengths, sequence):
    """What is added to positions; within the bounds that ops/ checks where it can."""
    offset = tl.load(lengths.offsets + sequence)
    return tl.minimum(tl.maximum(offset, -(2**29)), 2**29)


@triton.jit
def query_tile(
    Tq,
    Tk,
    left,
    right,
    offset,
    lengths,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What a program that owns BLOCK_M queries must know.

    Returns where: its sequence, batch row, first query and key, and the offset of its positions;
    of the keys (begin, end, whole_begin, whole_end, seen): those outside of begin (a multiple of
    BLOCK_N) and end are seen by no query of the tile, those inside of whole_begin and whole_end by
    every one, as far as length and band decide, and `seen` is the end of the visible ones;
    the tile's first query, and where its sequence's end.
    """
    tile = tl.program_id(0)
    if HAS_RIGHT:  # the last tiles see most keys: they start first
        tile = tl.num_programs(0) - 1 - tile
    sequence, first = locate(tile, Tq, lengths.cu_q, BLOCK_M)
    batch, q_begin, q_count = extent(sequence, Tq, lengths.cu_q)
    k_begin, _, seen = key_extent(sequence, Tk, lengths)
    if lengths.offsets is not None:
        offset = load_offset(lengths, sequence)
    begin = 0
    whole_begin = 0
    end = seen
    whole_end = seen
    if HAS_RIGHT:
        last = first + (offset + right)  # the first query's last key
        whole_end = tl.minimum(last + 1, seen)
        end = tl.minimum(last + BLOCK_M, seen)
    if HAS_LEFT:
        begin = tl.maximum(first + (offset - left), 0) // BLOCK_N * BLOCK_N  # the first's first
        whole_begin = first + (offset - left) + (BLOCK_M - 1)
    where = (sequence, batch, q_begin, k_begin, offset)
    return where, (begin, end, whole_begin, whole_end, seen), first, q_count


@triton.jit
def key_tile(
    Tq,
    Tk,
    left,
    right,
    offset,
    lengths,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What a program that owns BLOCK_N keys must know, as query_tile() for those of queries.

    Returns where; of the queries that see the tile (begin, end, whole_begin, whole_end); the
    tile's first key, where its sequence's keys and queries end, and how many keys are visible.
    """
    sequence, first = locate(tl.program_id(0), Tk, lengths.cu_k, BLOCK_N)
    batch, q_begin, q_count = extent(sequence, Tq, lengths.cu_q)
    k_begin, k_count, seen = key_extent(sequence, Tk, lengths)
    if lengths.offsets is not None:
        offset = load_offset(lengths, sequence)
    begin = 0
    whole_begin = 0
    end = tl.where(first < seen, q_count, 0)
    whole_end = end
    if HAS_RIGHT:
        earliest = first - (offset + right)  # the first query that sees the first key
        begin = tl.maximum(earliest, 0) // BLOCK_M * BLOCK_M
        whole_begin = earliest + (BLOCK_N - 1)
    if HAS_LEFT:
        latest = first - (offset - left)  # the last query that sees the first key
        end = tl.minimum(latest + BLOCK_N, end)
        whole_end = latest + 1
    where = (sequence, batch, q_begin, k_begin, offset)
    return where, (begin, end, whole_begin, whole_end), first, k_count, q_count, seen


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
def dropout_keys(dropout, batch, head, tokens, H, Tq, lengths):
    """row_keys of queries, numbered as in ops/_attention_reference.py, pairs_of()."""
    rows = tokens * H + head if lengths.cu_q is not None else (batch * H + head) * Tq + tokens
    return row_keys(dropout.seed, rows)
