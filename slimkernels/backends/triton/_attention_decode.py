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

from slimkernels.backends.triton._attention import dropout_keys, key_extent, load_offset, load_tile
from slimkernels.backends.triton._attention_launch import Prepared
from slimkernels.backends.triton._attention_scores import (
    LOWEST,
    added,
    exp_of,
    modified,
    scale_early,
    shown,
    split_lse,
)
from slimkernels.backends.triton._common import keep_mask

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
    widest = max(launch["BLOCK_D"], launch["BLOCK_DV"])
    # The rows that the first tensor core instruction fills anyhow. Fixed, where bits are.
    BLOCK_M = 64 if given.call.batch_invariant else min(max(triton.next_power_of_2(rows), 16), 64)
    BLOCK_M = BLOCK_M if widest <= 128 and y.dtype != torch.float32 else 16
    launch |= dict(BLOCK_M=BLOCK_M, BLOCK_N=64 if widest <= 128 else 16, num_warps=4, num_stages=2)
    tiles = triton.cdiv(rows, BLOCK_M)
    if given.call.batch_invariant:
        split = INVARIANT_SPLIT
    else:
        count = splits_of(B * Hkv * tiles, given.Tk, launch["BLOCK_N"], _multiprocessors(y.device))
        split = triton.cdiv(triton.cdiv(given.Tk, count), launch["BLOCK_N"]) * launch["BLOCK_N"]
    count = triton.cdiv(given.Tk, split)
    parts, part_lse = y, lse
    if count > 1:
        parts = torch.empty(count, *y.shape, dtype=torch.float32, device=y.device)
        part_lse = torch.empty(2, count, *lse.shape[1:], dtype=torch.float32, device=y.device)
    _split_kernel[(B * count, Hkv, tiles)](
        *(given.operands(), parts, *part_lse.unbind(), *given.shared(), split, B), **launch
    )
    if count > 1:
        sizes = dict(DV=launch["DV"], BLOCK_DV=launch["BLOCK_DV"])
        _merge_kernel[(lse[0].numel(),)](
            *(parts, *part_lse.unbind(), y, *lse.unbind(), count), **sizes
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


_NUMBERS = ["threshold", "Tq", "Tk", "left", "right", "offset", "split_keys", "B"]


@triton.jit(do_not_specialize=_NUMBERS)
def _split_kernel(
    x,
    parts,
    lse_ptr,
    low_ptr,
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
    split_keys,
    B,
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
    sequence = tl.program_id(0) % B
    split = tl.program_id(0) // B
    batch = sequence.to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1) * group
    k_begin, k_count, seen = key_extent(sequence, Tk, lengths)
    if lengths.offsets is not None:
        offset = load_offset(lengths, sequence)
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = row < group * Tq
    row = tl.minimum(row, group * Tq - 1)  # absent ones repeat the last, and are not stored
    head = key_head * group + row // Tq
    i = row % Tq
    at_q = batch * x.q.batch + head * x.q.head + i.to(tl.int64) * x.q.token
    dims = tl.arange(0, BLOCK_D)
    queries = tl.load(x.q.ptr + at_q[:, None] + dims[None, :], mask=dims[None, :] < D, other=0.0)
    queries, late = scale_early(queries, scoring.scale)
    if dropout.seed is not None:
        key0, key1 = dropout_keys(dropout, batch, head, i, H, Tq, lengths)
    place = (sequence, head[:, None], offset, left, right, Tq, seen)

    begin = split * split_keys
    end = tl.minimum(begin + split_keys, seen)
    whole_begin = 0
    whole_end = seen
    if HAS_RIGHT:
        whole_end = tl.minimum(offset + right + 1, seen)
        end = tl.minimum(offset + right + Tq, end)
    if HAS_LEFT:
        begin = tl.maximum(tl.maximum(offset - left, 0) // BLOCK_N * BLOCK_N, begin)
        whole_begin = offset - left + (Tq - 1)
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if scoring.sinks is not None:  # a score without a value, of the first split
        sinks = tl.load(scoring.sinks + head).to(tl.float32)
        peak = tl.where(split == 0, tl.maximum(peak, sinks), peak)
        total += tl.where(split == 0, 1.0, 0.0)
    sums = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        here = j < seen
        keys = load_tile(x.k, batch, key_head, start, here, D, BLOCK_N, BLOCK_D)
        if MODIFIED:
            extra = added(i[:, None], j[None, :], place, scoring)
        scores = tl.dot(queries, keys.T, input_precision=PRECISION)
        if MODIFIED:
            scores, outer, inner = modified(
                scores, late, extra, i[:, None], j[None, :], place, scoring, SCORE, None
            )
        scores = shown(
            scores,
            -float("inf"),
            i[:, None],
            j[None, :],
            (start < whole_begin) | (start + BLOCK_N > whole_end),
            place,
            scoring,
            HAS_LEFT,
            HAS_RIGHT,
            MASKED,
            MASK,
            True,
        )
        scale = 1.0 if MODIFIED else late
        raised = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        p = exp_of(scores, scale, raised[:, None], tl.float32 if MODIFIED else queries.dtype)
        shrink = tl.exp(peak - raised)
        peak = raised
        total = total * shrink + tl.sum(p, axis=1)
        if dropout.seed is not None:
            keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
            p = tl.where(keep, p, 0.0)
        values = load_tile(x.v, batch, key_head, start, here, DV, BLOCK_N, BLOCK_DV)
        sums = sums * shrink[:, None]
        sums = tl.dot(p.to(values.dtype), values, sums, input_precision=PRECISION)

    total = tl.where(total == 0.0, 1.0, total)
    sums *= (dropout.factor / total)[:, None]
    lse, low = split_lse(peak, total)
    at = ((split.to(tl.int64) * B + batch) * H + head) * Tq + i
    cols = tl.arange(0, BLOCK_DV)
    mask = present[:, None] & (cols < DV)[None, :]
    tl.store(parts + at[:, None] * DV + cols[None, :], sums.to(parts.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + at, lse, mask=present)
    tl.store(low_ptr + at, low, mask=present)


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
