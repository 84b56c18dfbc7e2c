"""Attention of few queries on many keys in Triton: decoding with a cache (flash decoding).

Dao, Haziza, Massa and Sizov 2023.

Tiling    One query leaves most of a GPU idle, so the keys are split, too: a program owns one split
          of one sequence and key head, and the queries of every head that reads it are the rows of
          its tile, so that a key is read once for its whole group. Another kernel merges them.
          The host does not know how long ragged sequences are. All have as many splits, chosen for
          the average length, and tiles hold their average number of queries or more.
Traffic   The roof is memory: the cache is read once. A split adds DV + 1 float32 a query and head.
Numerics  As in scaled_dot_product_attention.py; the merge is weighted by exp(lse of the split -
          lse), in float32. By default the number of splits fills the GPU, and so depends on the
          batch; batch_invariant fixes their length, and a row has the same bits in any batch.
Launch    grid = (tiles of queries * splits, key heads, tiles of rows); merge: (queries * heads,)
"""

import functools

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._attention import (
    dropout_keys,
    keys_seen,
    load_keys,
    locate,
    pairs_of,
    place_of,
    tiles_of,
    zeros,
)
from slimkernels.backends.triton._attention_launch import Prepared, rows_of
from slimkernels.backends.triton._attention_scores import (
    LOWEST,
    added,
    dropped,
    scale_early,
    softmax_end,
    softmax_start,
    softmax_step,
    split_lse,
)
from slimkernels.backends.triton._attention_terms import NUMBERS, Numbers, Queries, Tile

MOST_QUERIES = 16  # more fill tiles of their own
FEWEST_KEYS = 128
INVARIANT_SPLIT = 512  # keys
_MOST_SPLITS = 128


def applies(given: Prepared) -> bool:
    """Whether a call is decoding: of dense sequences each by itself, of ragged ones on average,
    which is all that the host knows, and which batch_invariant forbids to decide."""
    call, count = given.call, given.sequences if given.call.ragged else 1
    few, many = given.Tq <= MOST_QUERIES * count, given.Tk >= FEWEST_KEYS * count
    if call.batch_invariant:  # the longest sequence decides Tk, and must not decide a row's bits
        return few and not call.ragged
    return few and many


def forward(given: Prepared, y: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill y and lse, neither of them empty."""
    call, Hkv = given.call, given.H // given.group
    launch = given.launch("forward")
    tile = tile_of(launch["TILE"], given)
    launch |= dict(TILE=tile, num_warps=4, num_stages=2)
    queries, keys = given.Tq, given.Tk  # of a tile, and of a sequence
    if call.ragged:  # on average
        queries = max(triton.cdiv(given.Tq, given.sequences), tile.BLOCK_M // given.group)
        keys = triton.cdiv(given.Tk, given.sequences)
    tiles = tiles_of(given.query, call.cu_seqlens_q, queries)
    blocks = triton.cdiv(given.group * queries, tile.BLOCK_M)
    split = INVARIANT_SPLIT
    if not call.batch_invariant:
        programs = given.sequences * Hkv * blocks
        count = splits_of(programs, keys, tile.BLOCK_N, _multiprocessors(y.device))
        split = triton.cdiv(triton.cdiv(keys, count), tile.BLOCK_N) * tile.BLOCK_N
    count = triton.cdiv(keys, split)
    parts, part_lse = y, lse
    if count > 1:
        parts = torch.empty(count, *y.shape, dtype=torch.float32, device=y.device)
        part_lse = torch.empty(2, count, *lse.shape[1:], dtype=torch.float32, device=y.device)
    out = rows_of(y)._replace(ptr=parts)
    _split_kernel[(tiles * count, Hkv, blocks)](
        *(given.operands(), out, *part_lse.unbind(), *given.shared(), tiles, queries, split),
        **launch,
    )
    if count > 1:
        _merge_kernel[(lse[0].numel(),)](
            *(parts, *part_lse.unbind(), rows_of(y), *lse.unbind(), given.Tq, given.H, count),
            **dict(DV=tile.DV, BLOCK_DV=tile.BLOCK_DV),
        )


def tile_of(tile: Tile, given: Prepared) -> Tile:
    narrow = max(tile.BLOCK_D, tile.BLOCK_DV) <= 128
    # The rows that the first tensor core instruction fills anyhow.
    BLOCK_M = min(max(triton.next_power_of_2(given.group * given.Tq), 16), 64)
    if given.call.batch_invariant or given.call.ragged:
        BLOCK_M = 64  # bits are fixed, or one of the sequences may have more queries than others
    BLOCK_M = BLOCK_M if narrow and given.query.dtype != torch.float32 else 16
    return tile._replace(BLOCK_M=BLOCK_M, BLOCK_N=64 if narrow else 16)


def splits_of(programs: int, keys: int, BLOCK_N: int, multiprocessors: int) -> int:
    """The fewest splits whose last wave is nearly as full as that of any number of them."""
    most = min(_MOST_SPLITS, triton.cdiv(keys, 4 * BLOCK_N), 2 * multiprocessors)
    if programs >= 0.8 * multiprocessors or most <= 1:
        return 1

    def fullness(splits):
        waves = programs * splits / multiprocessors
        return waves / -(-programs * splits // multiprocessors)

    best = max(fullness(splits) for splits in range(1, most + 1))
    return next(s for s in range(1, most + 1) if fullness(s) >= 0.85 * best)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: enough for a few splits
        return 32
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=[*NUMBERS, "tiles", "tile_queries", "split_keys"])
def _split_kernel(
    x,
    out,
    lse_ptr,
    low_ptr,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    tiles,
    tile_queries,
    split_keys,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    key_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    sequence, first = locate(tile, tiles, Tq, terms.lengths.cu_q, tile_queries)
    place = place_of(sequence, terms, numbers)
    if first >= place.q_count:
        return
    rows = tiles.to(tl.int64) * Tq  # of a head, in all of the batch
    if terms.lengths.cu_k is not None:  # every sequence has as many splits, as long as it needs
        splits = tl.num_programs(0) // tiles
        split_keys = tl.cdiv(tl.cdiv(place.seen, splits), TILE.BLOCK_N) * TILE.BLOCK_N
        rows = tl.cast(Tq, tl.int64)
    H = tl.num_programs(1) * terms.group
    head, queries = _load_group(x.q, key_head, H, first, tile_queries, place, terms, numbers, TILE)
    span = keys_seen(first, tile_queries, place, FEATURES, TILE.BLOCK_N)
    begin = tl.maximum(span.begin, split * split_keys)
    end = tl.minimum(span.end, (split + 1) * split_keys)
    peak, total = softmax_start(head, split == 0, terms, TILE.BLOCK_M)
    sums = zeros(TILE.BLOCK_M, TILE.BLOCK_DV)
    for start in range(begin, end, TILE.BLOCK_N):
        keys = load_keys(x.k, key_head, start, place, TILE.D, TILE.BLOCK_N, TILE.BLOCK_D)
        pairs = pairs_of(queries, start, span, head[:, None], place, TILE.BLOCK_N)
        extra = added(pairs, terms.scoring, FEATURES)
        products = tl.dot(queries.q, keys.T, input_precision=FEATURES.PRECISION)
        p, shrink, peak, total = softmax_step(
            products, extra, queries, peak, total, pairs, terms, FEATURES
        )
        p = dropped(p, queries, pairs, 1.0, terms, numbers)
        values = load_keys(x.v, key_head, start, place, TILE.DV, TILE.BLOCK_N, TILE.BLOCK_DV)
        sums = sums * shrink[:, None]
        sums = tl.dot(p.to(values.dtype), values, sums, input_precision=FEATURES.PRECISION)

    sums, lse, low = softmax_end(sums, peak, total, terms)
    part = split * H * rows
    cols = tl.arange(0, TILE.BLOCK_DV)
    at = place.batch * out.batch + head * out.head + queries.token * out.token
    tl.store(
        out.ptr + (part * TILE.DV + at)[:, None] + cols[None, :],
        sums.to(out.ptr.dtype.element_ty),
        mask=queries.present[:, None] & (cols < TILE.DV)[None, :],
    )
    tl.store(lse_ptr + part + queries.at, lse, mask=queries.present)
    tl.store(low_ptr + part + queries.at, low, mask=queries.present)


@triton.jit
def _load_group(x, key_head, H, first, count, place, terms, numbers, TILE: tl.constexpr):
    """The head of each row, and Queries: `count` from `first` on of every head that reads a key
    head. Their `token` is each row's."""
    row = tl.program_id(2) * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    i = first + row % count
    present = (row < terms.group * count) & (i < place.q_count)
    # Absent ones repeat the last, and are not stored.
    head = key_head * terms.group + tl.minimum(row // count, terms.group - 1)
    i = tl.minimum(i, place.q_count - 1)
    token = place.q_begin + i
    at = (place.batch * H + head) * numbers.Tq + token
    start = place.batch * x.batch + head * x.head + token * x.token
    dims = tl.arange(0, TILE.BLOCK_D)
    q = tl.load(x.ptr + start[:, None] + dims[None, :], mask=dims[None, :] < TILE.D, other=0.0)
    q, late = scale_early(q, terms.scoring.scale)
    key0, key1 = dropout_keys(place.batch, head, token, H, terms, numbers, 1)
    return head, Queries(i[:, None], token, present, at, q, late, key0, key1)


@triton.jit(do_not_specialize=["Tq", "count"])
def _merge_kernel(
    parts,
    part_lse,
    part_low,
    y,
    lse_ptr,
    low_ptr,
    Tq,
    H,
    count,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One query of one head: its splits' results, weighted by what they saw of the whole."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    head = row // Tq  # of the batch
    y_at = head // H * y.batch + head % H * y.head + row % Tq * y.token
    cols = tl.arange(0, BLOCK_DV)
    peak = tl.load(part_lse + row)
    for split in range(1, count):
        peak = tl.maximum(peak, tl.load(part_lse + split * rows + row))
    peak = tl.maximum(peak, LOWEST)  # a query that sees nothing: exp(-inf + inf) would be NaN
    total = 0.0
    sums = tl.zeros((BLOCK_DV,), tl.float32)
    for split in range(0, count):
        at = split * rows + row
        weight = tl.exp((tl.load(part_lse + at) - peak) + tl.load(part_low + at))
        total += weight
        sums += weight * tl.load(
            parts + (split * rows * DV + y_at) + cols, mask=cols < DV, other=0.0
        )
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(y.ptr + y_at + cols, (sums / total).to(y.ptr.dtype.element_ty), mask=cols < DV)
    lse, low = split_lse(peak, total)
    tl.store(lse_ptr + row, lse)
    tl.store(low_ptr + row, low)
