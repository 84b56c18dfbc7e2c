"""Where a tile lies in attention's operands, dense and ragged, and which others it meets."""

import triton
import triton.language as tl

from slimkernels.backends.triton._attention_scores import scale_early
from slimkernels.backends.triton._attention_terms import Pairs, Place, Queries, Span
from slimkernels.backends.triton._common import row_keys


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
def locate(tile, tiles, T, cu_ptr, BLOCK):
    """The sequence that one of the tiles of tiles_of() is in, and the tile's first token there.

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
        B = tiles - T // BLOCK
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
def place_of(sequence, terms, numbers):
    batch, q_begin, q_count = extent(sequence, numbers.Tq, terms.lengths.cu_q)
    k_begin, k_count, seen = key_extent(sequence, numbers.Tk, terms.lengths)
    offset = numbers.offset
    if terms.lengths.offsets is not None:
        offset = load_offset(terms.lengths, sequence)
    left = numbers.left
    right = numbers.right
    return Place(sequence, batch, q_begin, q_count, k_begin, k_count, seen, offset, left, right)


@triton.jit
def keys_seen(first, count, place, FEATURES: tl.constexpr, BLOCK_N: tl.constexpr):
    """The Span of the keys that `count` queries from `first` on see."""
    begin = 0
    whole_begin = 0
    end = place.seen
    whole_end = place.seen
    if FEATURES.HAS_RIGHT:
        last = first + (place.offset + place.right)  # the first query's last key
        whole_end = tl.minimum(last + 1, place.seen)
        end = tl.minimum(last + count, place.seen)
    if FEATURES.HAS_LEFT:
        earliest = first + (place.offset - place.left)  # the first query's first key
        begin = tl.maximum(earliest, 0) // BLOCK_N * BLOCK_N
        whole_begin = earliest + (count - 1)
    return Span(begin, end, whole_begin, whole_end)


@triton.jit
def query_tile(terms, numbers, FEATURES: tl.constexpr, TILE: tl.constexpr):
    """Of a program that owns BLOCK_M queries: the Place, the first one, and the Span of the keys.
    A program whose first query is past the sequence's end has nothing to do."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    if FEATURES.HAS_RIGHT:  # the last tiles see most keys: they start first
        tile = tiles - 1 - tile
    sequence, first = locate(tile, tiles, numbers.Tq, terms.lengths.cu_q, TILE.BLOCK_M)
    place = place_of(sequence, terms, numbers)
    return place, first, keys_seen(first, TILE.BLOCK_M, place, FEATURES, TILE.BLOCK_N)


@triton.jit
def key_tile(terms, numbers, FEATURES: tl.constexpr, TILE: tl.constexpr):
    """Of a program that owns BLOCK_N keys: the Place, the first one, and the Span of the queries.
    A program whose first key is past the sequence's end has nothing to do."""
    tiles = tl.num_programs(0)
    cu_k = terms.lengths.cu_k
    sequence, first = locate(tl.program_id(0), tiles, numbers.Tk, cu_k, TILE.BLOCK_N)
    place = place_of(sequence, terms, numbers)
    begin = 0
    whole_begin = 0
    end = tl.where(first < place.seen, place.q_count, 0)
    whole_end = end
    if FEATURES.HAS_RIGHT:
        earliest = first - (place.offset + place.right)  # the first query that sees the first key
        begin = tl.maximum(earliest, 0) // TILE.BLOCK_M * TILE.BLOCK_M
        whole_begin = earliest + (TILE.BLOCK_N - 1)
    if FEATURES.HAS_LEFT:
        latest = first - (place.offset - place.left)  # the last query that sees the first key
        end = tl.minimum(latest + TILE.BLOCK_N, end)
        whole_end = latest + 1
    return place, first, Span(begin, end, whole_begin, whole_end)


@triton.jit
def zeros(rows: tl.constexpr, cols: tl.constexpr):
    return tl.zeros((rows, cols), tl.float32)  # the fields of a Tile cannot stand in a shape


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
def load_queries(x, head, H, first, place, terms, numbers, TILE: tl.constexpr, AXIS: tl.constexpr):
    """BLOCK_M queries from `first` on. AXIS  1 if they are the rows of scores, 0 if columns"""
    i = first + tl.arange(0, TILE.BLOCK_M)
    present = i < place.q_count
    tokens = place.q_begin + i
    at = (place.batch * H + head) * numbers.Tq + tokens
    token = place.q_begin + first
    q = load_tile(x, place.batch, head, token, present, TILE.D, TILE.BLOCK_M, TILE.BLOCK_D)
    q, late = scale_early(q, terms.scoring.scale)
    key0, key1 = dropout_keys(place.batch, head, tokens, H, terms, numbers, AXIS)
    return Queries(tl.expand_dims(i, AXIS), token, present, at, q, late, key0, key1)


@triton.jit
def load_beside(x, queries, head, place, TILE: tl.constexpr):
    """dy or y of the same queries."""
    token = queries.token
    return load_tile(
        x, place.batch, head, token, queries.present, TILE.DV, TILE.BLOCK_M, TILE.BLOCK_DV
    )


@triton.jit
def load_keys(x, head, first, place, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_N keys or values from `first` on, zeros past the visible ones."""
    here = first + tl.arange(0, BLOCK_N) < place.seen
    return load_tile(x, place.batch, head, place.k_begin + first, here, D, BLOCK_N, BLOCK_D)


@triton.jit
def pairs_of(queries, first, span, head, place, BLOCK_N: tl.constexpr):
    """Queries, as rows, and the BLOCK_N keys from `first` on."""
    j = (first + tl.arange(0, BLOCK_N))[None, :]
    edge = (first < span.whole_begin) | (first + BLOCK_N > span.whole_end)
    return Pairs(queries.i, j, head, place, edge)


@triton.jit
def dropout_keys(batch, head, tokens, H, terms, numbers, AXIS: tl.constexpr):
    """row_keys of queries, numbered as in ops/_attention_reference.py, pairs_of()."""
    key0 = 0
    key1 = 0
    if terms.dropout.seed is not None:
        rows = (batch * H + head) * numbers.Tq + tokens
        if terms.lengths.cu_q is not None:
            rows = tokens * H + head
        key0, key1 = row_keys(terms.dropout.seed, rows)
        key0 = tl.expand_dims(key0, AXIS)
        key1 = tl.expand_dims(key1, AXIS)
    return key0, key1
