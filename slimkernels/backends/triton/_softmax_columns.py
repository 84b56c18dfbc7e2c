"""Softmax, or its logarithm, over the middle dimension of x (M, N, inner): of columns.

Tiling    A program owns BLOCK_I neighbouring columns and walks their N elements in blocks, twice:
          for maxima and sums, and to write.
Traffic   forward reads and writes each element, backward reads two and writes one; the second walk
          reads again, from the caches where a block's columns fit them. x is not transposed.
Numerics  as of rows, in _softmax.py.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends._mask import mask_columns
from slimkernels.backends.triton._residual import drop_and_scale, dropout_numbers
from slimkernels.backends.triton._softmax import (
    dropout_of,
    gradient_of,
    mask_of,
    normalized,
    scores_at,
    store_dropped,
    term_of,
)

TILE = 2048  # elements: 16 a lane of 4 warps
MOST_COLUMNS = 64  # of a tile: 128 bytes of bfloat16 side by side


def columns_softmax_of(x, scale, mask, dropout_p=0.0, seed=None, log=False):
    """y, and y before dropout, empty without."""
    x = x.contiguous()
    y = torch.empty_like(x)
    kept, dropout, threshold = dropout_of(x, dropout_p, seed)
    if x.numel():
        N, inner, grid, launch = _tiles(x)
        _forward_kernel[grid](
            *(x, mask_of(mask, mask_columns), dropout, y, N, inner, scale, threshold),
            LOG=log,
            **launch,
        )
    return y, kept


def columns_gradient_of(dy, y, scale, dropout_p=0.0, seed=None, log=False, hides=False):
    """dx."""
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    if y.numel():
        N, inner, grid, launch = _tiles(y)
        _backward_kernel[grid](
            *(dy, y, seed, dx, N, inner, scale, *dropout_numbers(dropout_p)),
            LOG=log,
            HIDES=hides,
            **launch,
        )
    return dx


def _tiles(x):
    *_, N, inner = x.shape
    BLOCK_I = min(triton.next_power_of_2(inner), MOST_COLUMNS)
    BLOCK_N = min(max(triton.next_power_of_2(N), 16), TILE // BLOCK_I)
    programs = x.numel() // (N * inner) * triton.cdiv(inner, BLOCK_I)
    return N, inner, (programs,), dict(BLOCK_N=BLOCK_N, BLOCK_I=BLOCK_I, num_warps=4)


@triton.jit
def _place(N, inner, BLOCK_I: tl.constexpr):
    """A program's block of the first dimension (int64), and its columns."""
    blocks = tl.cdiv(inner, BLOCK_I)
    cols = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), cols


@triton.jit
def _scores(x_ptr, mask, m, n, cols, N, inner, scale):
    """The scores of a tile, what is to be their maximum, where they are, and which exist."""
    at = (m * N + n) * inner + cols
    inside = (n < N) & (cols < inner)
    mask_ptrs = None
    if mask is not None:
        start = mask.mask + m * mask.stride_outer
        mask_ptrs = start + n.to(tl.int64) * mask.stride_middle + cols * mask.stride_col
    s, tops = scores_at(x_ptr + at, mask_ptrs, inside, inside, scale)
    return s, tops, at, inside


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(
    x_ptr,
    mask,
    dropout,
    y_ptr,
    N,
    inner,
    scale,
    threshold,
    LOG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    m, cols = _place(N, inner, BLOCK_I)
    peak = tl.full((1, BLOCK_I), -float("inf"), tl.float32)
    total = tl.zeros((1, BLOCK_I), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        s, tops, at, inside = _scores(x_ptr, mask, m, n, cols, N, inner, scale)
        top = tl.max(tops, axis=0, keep_dims=True)
        raised = tl.where(top > peak, top, peak)
        # While nothing is seen, it adds exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(s - shift), axis=0, keep_dims=True)
        peak = raised

    nothing = peak == -float("inf")
    shift = tl.where(nothing, 0.0, peak)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        s, tops, at, inside = _scores(x_ptr, mask, m, n, cols, N, inner, scale)
        y = normalized(s, shift, total, nothing, LOG)
        store_dropped(y_ptr, at, y, inside, dropout, m * N + n, cols, threshold)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(
    dy_ptr,
    y_ptr,
    seed_ptr,
    dx_ptr,
    N,
    inner,
    scale,
    threshold,
    factor,
    LOG: tl.constexpr,
    HIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    m, cols = _place(N, inner, BLOCK_I)
    total = tl.zeros((1, BLOCK_I), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        at = (m * N + n) * inner + cols
        inside = (n < N) & (cols < inner)
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = drop_and_scale(g, seed_ptr, None, m * N + n, cols, threshold, factor)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(term_of(g, y, inside, LOG, HIDES), axis=0, keep_dims=True)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)[:, None]
        at = (m * N + n) * inner + cols
        inside = (n < N) & (cols < inner)
        g = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = drop_and_scale(g, seed_ptr, None, m * N + n, cols, threshold, factor)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, gradient_of(g, y, total, scale, LOG, HIDES), mask=inside)
