"""Attention of few queries on many keys in Triton: decoding with a cache (flash decoding).

Dao, Haziza, Massa and Sizov 2023.

Tiling    One query leaves most of a GPU idle, so the keys are split, too: a program owns one split
          of one sequence and key head, and the queries of every head that reads it are the rows of
          its tile, so that a key is read once for its whole group. Another kernel merges them.
Traffic   The roof is memory: the cache is read once. A split adds DV + 1 float32 a query and head.
Numerics  As in scaled_dot_product_attention.py; the merge is weighted by exp(lse of the split -
          lse), in float32. By default the number of splits fills the GPU, and so depends on the
          batch; batch_invariant fixes their length, and a row has the same bits in any batch.
Launch    grid = (sequences * splits, key heads, tiles of rows); merge: (queries of all heads,)
"""

import functools

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._attention import (
    dropout_keys,
    keys_seen,
    load_keys,
    pairs_of,
    place_of,
    zeros,
)
from slimkernels.backends.triton._attention_launch import Prepared
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
from slimkernels.backends.triton._attention_terms import NUMBERS, Numbers, Queries

MOST_QUERIES = 16  # more fill tiles of their own
FEWEST_KEYS = 128
INVARIANT_SPLIT = 512  # keys
_MOST_SPLITS = 128


def applies(given: Prepared) -> bool:
    """Whether a call is decoding: from its shape without the batch, which must not decide."""
    if given.call.ragged or given.Tq > MOST_QUERIES:
        return False
    # The longest sequence of the batch decides Tk, and must not decide a row's bits.
    return given.call.batch_invariant or given.Tk >= FEWEST_KEYS


def forward(given: Prepared, y: torch.Tensor, lse: torch.Tensor) -> None:
    """Fill y (B, H, Tq, DV) and lse (2, B, H, Tq), neither of them empty."""
    B, Hkv, rows = given.sequences, given.H // given.group, given.group * given.Tq
    launch = given.launch("forward")
    tile = launch["TILE"]
    widest = max(tile.BLOCK_D, tile.BLOCK_DV)
    # The rows that the first tensor core instruction fills anyhow. Fixed, where bits are.
    BLOCK_M = 64 if given.call.batch_invariant else min(max(triton.next_power_of_2(rows), 16), 64)
    BLOCK_M = BLOCK_M if widest <= 128 and y.dtype != torch.float32 else 16
    tile = tile._replace(BLOCK_M=BLOCK_M, BLOCK_N=64 if widest <= 128 else 16)
    launch |= dict(TILE=tile, num_warps=4, num_stages=2)
    tiles = triton.cdiv(rows, BLOCK_M)
    if given.call.batch_invariant:
        split = INVARIANT_SPLIT
    else:
        count = splits_of(B * Hkv * tiles, given.Tk, tile.BLOCK_N, _multiprocessors(y.device))
        split = triton.cdiv(triton.cdiv(given.Tk, count), tile.BLOCK_N) * tile.BLOCK_N
    count = triton.cdiv(given.Tk, split)
    parts, part_lse = y, lse
    if count > 1:
        parts = torch.empty(count, *y.shape, dtype=torch.float32, device=y.device)
        part_lse = torch.empty(2, count, *lse.shape[1:], dtype=torch.float32, device=y.device)
    _split_kernel[(B * count, Hkv, tiles)](
        *(given.operands(), parts, *part_lse.unbind(), *given.shared(), split, B), **launch
    )
    if count > 1:
        _merge_kernel[(lse[0].numel(),)](
            *(parts, *part_lse.unbind(), y, *lse.unbind(), count),
            **dict(DV=tile.DV, BLOCK_DV=tile.BLOCK_DV),
        )


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


@triton.jit(do_not_specialize=[*NUMBERS, "split_keys", "B"])
def _split_kernel(
    x,
    parts,
    lse_ptr,
    low_ptr,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    split_keys,
    B,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    key_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(0) // B
    place = place_of(tl.program_id(0) % B, terms, numbers)
    H = tl.num_programs(1) * terms.group
    head, queries = _load_group(x.q, key_head, H, place, terms, numbers, TILE)
    span = keys_seen(0, Tq, place, FEATURES, TILE.BLOCK_N)
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
    at = split.to(tl.int64) * B * H * Tq + queries.at
    cols = tl.arange(0, TILE.BLOCK_DV)
    mask = queries.present[:, None] & (cols < TILE.DV)[None, :]
    to = parts + at[:, None] * TILE.DV + cols[None, :]
    tl.store(to, sums.to(parts.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + at, lse, mask=queries.present)
    tl.store(low_ptr + at, low, mask=queries.present)


@triton.jit
def _load_group(x, key_head, H, place, terms, numbers, TILE: tl.constexpr):
    """The queries of all heads that read a key head, as rows, and the head of each."""
    count = terms.group * numbers.Tq
    row = tl.program_id(2) * TILE.BLOCK_M + tl.arange(0, TILE.BLOCK_M)
    present = row < count
    row = tl.minimum(row, count - 1)  # absent ones repeat the last, and are not stored
    head = key_head * terms.group + row // numbers.Tq
    i = row % numbers.Tq
    at = (place.batch * H + head) * numbers.Tq + i
    start = place.batch * x.batch + head * x.head + i.to(tl.int64) * x.token
    dims = tl.arange(0, TILE.BLOCK_D)
    q = tl.load(x.ptr + start[:, None] + dims[None, :], mask=dims[None, :] < TILE.D, other=0.0)
    q, late = scale_early(q, terms.scoring.scale)
    key0, key1 = dropout_keys(place.batch, head, i, H, terms, numbers, 1)
    return head, Queries(i[:, None], 0, present, at, q, late, key0, key1)


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(
    parts,
    part_lse,
    part_low,
    y_ptr,
    lse_ptr,
    low_ptr,
    count,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One query of one head: its splits' results, weighted by what they saw of the whole."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
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
        sums += weight * tl.load(parts + at * DV + cols, mask=cols < DV, other=0.0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(y_ptr + row * DV + cols, (sums / total).to(y_ptr.dtype.element_ty), mask=cols < DV)
    lse, low = split_lse(peak, total)
    tl.store(lse_ptr + row, lse)
    tl.store(low_ptr + row, low)
