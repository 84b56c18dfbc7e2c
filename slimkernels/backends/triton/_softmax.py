"""Softmax of rows in Triton: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale + mask.

With LOG its logarithm: y = s - max(s) - log(sum(exp(s - max(s)))).

Tiling    Rows of up to MAX_TILE elements stay in registers, several short ones a program. A longer
          row is walked in blocks by one program, twice: for its maximum and sum, and to be written.
Traffic   forward reads N and writes N elements a row, backward reads 2 N and writes N: the roof is
          DRAM bandwidth. A long row is read again for the second walk, and may come from L2. What
          causality hides is not read, but for the last 16 elements or the last block that it cuts;
          what the mask hides is. The mask is read through its strides, so rows that share one find
          it in the caches. Dropout writes another N; its bits are drawn again.
Numerics  float32. Subtracting the row's maximum bounds exp by 1; over blocks the sum so far is
          rescaled when the maximum rises. A row whose scores are all -inf is NaN, as in torch; one
          that sees nothing is zero, its logarithm -inf.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from slimkernels.backends._mask import MaskRows, mask_rows
from slimkernels.backends.triton._common import warps_of
from slimkernels.backends.triton._residual import drop_and_scale, dropout_numbers

TILE = 2048  # elements of several short rows: 16 a lane
MAX_TILE = 16384  # the longest row held in registers: 32 elements a lane in each of two tensors
BLOCK = 4096  # of a longer row
MAX_ROW = 2**31 - 1 - BLOCK  # columns are counted in 32 bits, past the end of the last block
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


class Sinks(NamedTuple):
    """One more score in every row of a head: pointers to it, and to its share of each row."""

    ptr: Any
    shares: Any
    queries: Any  # rows of a head
    heads: Any


class Dropout(NamedTuple):
    """Pointers to the seed and to y before dropout, and what survivors are multiplied by."""

    seed: Any
    kept: Any
    factor: Any


def unsupported_row(x, dim):
    """The refusal of rows whose columns the kernels cannot count."""
    if dim == -1 and x.shape[-1] > MAX_ROW:
        return f"it takes rows of up to {MAX_ROW} elements, and input's have {x.shape[-1]}"
    return None


def softmax_of(x, scale, mask, is_causal, sinks=None, dropout_p=0.0, seed=None, log=False):
    """y; y before dropout, empty without; the sinks' shares, empty without."""
    x = x.contiguous()
    y = torch.empty_like(x)
    shares = x.new_empty((0,) if sinks is None else x.shape[:-1], dtype=torch.float32)
    kept, dropout, threshold = dropout_of(x, dropout_p, seed)
    if not x.numel():
        return y, kept, shares
    N = x.shape[-1]
    M = x.numel() // N
    if sinks is not None:
        sinks = Sinks(sinks.contiguous(), shares, x.shape[-2], x.shape[-3])
    period = x.shape[-2] if is_causal else None
    given = x, mask_of(mask, mask_rows), sinks, dropout, y, M, N, period, scale, threshold
    if N <= MAX_TILE:
        grid, launch = _tiles(M, N)
        _forward_kernel[grid](*given, LOG=log, **launch)
    else:
        _forward_long_kernel[(M,)](*given, LOG=log, **_blocks())
    return y, kept, shares


def gradients_of(dy, y, scale, shares=None, dropout_p=0.0, seed=None, log=False, hides=False):
    """dx and the sinks' gradient in float32, empty without sinks."""
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    has_sinks = shares is not None and shares.dim() > 1
    products = torch.empty_like(shares) if has_sinks else None
    if y.numel():
        N = y.shape[-1]
        M = y.numel() // N
        threshold, factor = dropout_numbers(dropout_p)
        given = dy, y, shares if has_sinks else None, seed, dx, products, M, N, scale
        given = *given, threshold, factor
        if N <= MAX_TILE:
            grid, launch = _tiles(M, N)
            _backward_kernel[grid](*given, LOG=log, HIDES=hides, **launch)
        else:
            _backward_long_kernel[(M,)](*given, LOG=log, HIDES=hides, **_blocks())
    elif has_sinks:
        products.zero_()
    if not has_sinks:
        return dx, y.new_empty(0, dtype=torch.float32)
    heads = products.dim() - 2
    return dx, products.sum([d for d in range(products.dim()) if d != heads])


def dropout_of(x, dropout_p, seed):
    """Room for y before dropout, what kernels take of it, and its threshold."""
    threshold, factor = dropout_numbers(dropout_p)
    if seed is None:
        return x.new_empty(0), None, threshold
    kept = torch.empty_like(x)
    return kept, Dropout(seed, kept, factor), threshold


def mask_of(mask, described):
    """The mask, a bool one as bytes, and where its rows or columns begin: backends/_mask.py."""
    if mask is None:
        return None
    mask, *places = described(mask)
    return MaskRows(mask.view(torch.uint8) if mask.dtype == torch.bool else mask, *places)


def _tiles(M, N):
    """The programs that share M rows, and how many rows each holds whole."""
    BLOCK_N = max(triton.next_power_of_2(N), 16)
    BLOCK_M = max(TILE // BLOCK_N, 1)
    launch = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=warps_of(BLOCK_M * BLOCK_N))
    return (triton.cdiv(M, BLOCK_M),), launch


def _blocks():
    return dict(BLOCK_N=BLOCK, num_warps=warps_of(BLOCK))


@triton.jit
def _mask_starts(mask, rows):
    """Where the rows of the mask begin: slimkernels/backends/_mask.py."""
    blocks = rows // mask.inner
    starts = blocks // mask.middle * mask.stride_outer + blocks % mask.middle * mask.stride_middle
    return mask.mask + starts + rows % mask.inner * mask.stride_inner


@triton.jit
def scores_at(x_ptrs, mask_ptrs, inside, seen, scale):
    """The scores, -inf where hidden, and what is to be their maximum.

    There a seen -inf counts as the lowest number: a maximum of -inf is a row that sees nothing.
    Loads do not ask what is hidden: they are 16 bytes wide where that changes in steps of 16
    elements, as the ends of rows do.
    """
    s = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32) * scale
    if mask_ptrs is not None:
        m = tl.load(mask_ptrs, mask=inside, other=0)
        if m.dtype == tl.uint8:
            seen = seen & (m != 0)
        else:
            m = m.to(tl.float32)
            seen = seen & (m != -float("inf"))
            s += m
    s = tl.where(seen, s, -float("inf"))
    # Not tl.maximum: of NaN it makes NaN in the interpreter, which tl.max would pass over.
    return s, tl.where(seen, tl.where(s > LOWEST, s, LOWEST), s)


@triton.jit
def normalized(s, shift, total, nothing, LOG: tl.constexpr):
    """y from scores, their maximum (0 where nothing is seen) and the sum of exponentials."""
    if LOG:
        y = tl.where(nothing, -float("inf"), s - shift - tl.log(total))
    else:
        e = tl.exp(s - shift)
        # Rounded once: backward takes the difference of two numbers as great as y.
        y = tl.where(nothing, 0.0, tl.div_rn(e, tl.broadcast_to(total, e.shape)))
    return y


@triton.jit
def store_dropped(y_ptr, at, y, inside, dropout, rows, cols, threshold):
    """Stores y, or y before and after dropout."""
    if dropout is not None:
        tl.store(dropout.kept + at, y, mask=inside)
        y = drop_and_scale(y, dropout.seed, None, rows, cols, threshold, dropout.factor)
    tl.store(y_ptr + at, y, mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(
    x_ptr,
    mask,
    sinks,
    dropout,
    y_ptr,
    M,
    N,
    period,
    scale,
    threshold,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    at = rows * N + cols  # can pass 2^31
    whole = (rows < M) & (cols < N)
    inside, seen = whole, whole
    if period is not None:
        last = rows % period
        inside = whole & (cols < (last // 16 + 1) * 16)
        seen = whole & (cols <= last)
    mask_ptrs = None
    if mask is not None:
        mask_ptrs = _mask_starts(mask, rows) + cols * mask.stride_col
    s, tops = scores_at(x_ptr + at, mask_ptrs, inside, seen, scale)

    peak = tl.max(tops, axis=1, keep_dims=True)
    if sinks is not None:
        sink = tl.load(sinks.ptr + rows // sinks.queries % sinks.heads).to(tl.float32)
        peak = tl.where(sink > peak, sink, peak)
    nothing = peak == -float("inf")
    shift = tl.where(nothing, 0.0, peak)
    total = tl.sum(tl.exp(s - shift), axis=1, keep_dims=True)
    if sinks is not None:
        share = tl.exp(sink - shift)
        total += share
        share = tl.where(nothing, 0.0, share / total)
        tl.store(sinks.shares + rows, share, mask=rows < M)
    y = normalized(s, shift, total, nothing, LOG)
    store_dropped(y_ptr, at, y, whole, dropout, rows, cols, threshold)


@triton.jit(do_not_specialize=["threshold"])
def _forward_long_kernel(
    x_ptr,
    mask,
    sinks,
    dropout,
    y_ptr,
    M,
    N,
    period,
    scale,
    threshold,
    LOG: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = row * N
    seen_end = N
    if period is not None:
        seen_end = tl.minimum(row % period + 1, N)

    peak = -float("inf")
    if sinks is not None:
        sink = tl.load(sinks.ptr + row // sinks.queries % sinks.heads).to(tl.float32)
        peak = sink
    totals = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, seen_end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask_ptrs = None
        if mask is not None:
            mask_ptrs = _mask_starts(mask, row) + cols * mask.stride_col
        s, tops = scores_at(x_ptr + begin + cols, mask_ptrs, cols < N, cols < seen_end, scale)
        top = tl.max(tops, axis=0)
        raised = tl.where(top > peak, top, peak)
        # While nothing is seen, it adds exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        totals = totals * tl.exp(peak - shift) + tl.exp(s - shift)
        peak = raised

    nothing = peak == -float("inf")
    shift = tl.where(nothing, 0.0, peak)
    total = tl.sum(totals, axis=0)
    if sinks is not None:
        share = tl.exp(sink - shift)
        total += share
        tl.store(sinks.shares + row, tl.where(nothing, 0.0, share / total))
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask_ptrs = None
        if mask is not None:
            mask_ptrs = _mask_starts(mask, row) + cols * mask.stride_col
        reach = tl.where(start < seen_end, N, 0)  # past what is seen nothing is read
        s, _ = scores_at(x_ptr + begin + cols, mask_ptrs, cols < reach, cols < seen_end, scale)
        y = normalized(s, shift, total, nothing, LOG)
        store_dropped(y_ptr, begin + cols, y, cols < N, dropout, row, cols, threshold)


@triton.jit
def term_of(g, y, inside, LOG: tl.constexpr, HIDES: tl.constexpr):
    """What a row's sum adds up; where HIDES, what is -inf in the logarithm has no part in it."""
    term = g
    if not LOG:
        term = g * y
    elif HIDES:
        term = tl.where(inside & (y != -float("inf")), g, 0.0)
    return term


@triton.jit
def gradient_of(g, y, total, scale, LOG: tl.constexpr, HIDES: tl.constexpr):
    """dx of a softmax, or of its logarithm."""
    if LOG:
        dx = scale * (g - tl.exp(y) * total)
        if HIDES:
            dx = tl.where(y == -float("inf"), 0.0, dx)
    else:
        dx = scale * y * (g - total)
    return dx


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(
    dy_ptr,
    y_ptr,
    shares_ptr,
    seed_ptr,
    dx_ptr,
    products_ptr,
    M,
    N,
    scale,
    threshold,
    factor,
    LOG: tl.constexpr,
    HIDES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    at = rows * N + cols
    inside = (rows < M) & (cols < N)
    g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = drop_and_scale(g, seed_ptr, None, rows, cols, threshold, factor)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(term_of(g, y, inside, LOG, HIDES), axis=1, keep_dims=True)
    tl.store(dx_ptr + at, gradient_of(g, y, total, scale, LOG, HIDES), mask=inside)
    if products_ptr is not None:
        share = tl.load(shares_ptr + rows, mask=rows < M, other=0.0)
        tl.store(products_ptr + rows, -share * total, mask=rows < M)


@triton.jit(do_not_specialize=["threshold"])
def _backward_long_kernel(
    dy_ptr,
    y_ptr,
    shares_ptr,
    seed_ptr,
    dx_ptr,
    products_ptr,
    M,
    N,
    scale,
    threshold,
    factor,
    LOG: tl.constexpr,
    HIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = row * N
    totals = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.load(dy_ptr + begin + cols, mask=cols < N, other=0.0).to(tl.float32)
        g = drop_and_scale(g, seed_ptr, None, row, cols, threshold, factor)
        y = tl.load(y_ptr + begin + cols, mask=cols < N, other=0.0).to(tl.float32)
        totals += term_of(g, y, cols < N, LOG, HIDES)
    total = tl.sum(totals, axis=0)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        g = tl.load(dy_ptr + begin + cols, mask=cols < N, other=0.0).to(tl.float32)
        g = drop_and_scale(g, seed_ptr, None, row, cols, threshold, factor)
        y = tl.load(y_ptr + begin + cols, mask=cols < N, other=0.0).to(tl.float32)
        dx = gradient_of(g, y, total, scale, LOG, HIDES)
        tl.store(dx_ptr + begin + cols, dx, mask=cols < N)
    if products_ptr is not None:
        tl.store(products_ptr + row, -tl.load(shares_ptr + row) * total)
