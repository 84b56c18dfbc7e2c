"""Norms of rows that do not fit in registers: cut into parts, each of which a program holds.

Tiling    BLOCK elements a part. Forward is two kernels over all (row, part): the moments of each
          part, then y, for which every program joins the moments of its row's parts. Backward is
          two as well: each part's sums, then dx, where a program takes the same part of several
          rows and keeps that part's share of dweight and dbias in registers.
Traffic   x, in backward dy and x, are read twice: the second time from L2 where it holds them.
Numerics  The parts' moments, each two-pass, are joined by the formula of Chan, Golub and LeVeque
          (1983), which does not cancel. No atomics: every sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends.triton._common import row_programs
from slimkernels.backends.triton._residual import add_branch, dropout_numbers, store_gradients
from slimkernels.backends.triton._rows import load_weight, partial_sums, scale_and_shift

BLOCK = 2048
WARPS = 8  # 8 elements a lane: 128 bits of bfloat16


def forward(x, weight, bias, y, mean, rstd, eps, zero_centered=False, *, branch=None, spread=None):
    """Fills y, mean and rstd of x (..., N). A mean of None means RMSNorm.

    branch  (x, residual, seed, row_scale, dropout_p), of which the first argument, x, is made
    spread  (groups, S): S neighbours have one parameter, and rows take turns at groups of them
    """
    N = x.shape[-1]
    M, parts, sizes = _cut(x)
    moments = x.new_empty((2, M, parts), dtype=torch.float32)
    is_rms = mean is None
    added, residual, seed, row_scale, dropout_p = branch or (x, None, None, None, 0.0)
    total = None if branch is None else x
    _moments_kernel[(M * parts,)](
        *(added, residual, total, seed, row_scale, moments, M, N, *dropout_numbers(dropout_p)),
        IS_RMS=is_rms,
        **sizes,
    )
    _normalize_kernel[(M * parts,)](
        *(x, weight, bias, y, moments, mean, rstd, M, N, eps, *(spread or (None, None))),
        PARTS=triton.next_power_of_2(parts),
        ZERO_CENTERED=zero_centered,
        **sizes,
    )


def backward(
    dy, x, weight, bias, mean, rstd, dx, zero_centered=False, *, dresidual=None, branch=None
) -> list[Tensor | None]:
    """Fills dx, and returns the partial sums of dweight and dbias: _rows.partial_sums.

    branch     (dsum, seed, row_scale, dropout_p), where x is a sum whose gradient is dresidual;
               dx may be None then
    """
    N = x.shape[-1]
    M, parts, sizes = _cut(x)
    sums = x.new_empty((2, M, parts), dtype=torch.float32)
    _sums_kernel[(M * parts,)](
        *(dy, x, weight, mean, rstd, sums, M, N), ZERO_CENTERED=zero_centered, **sizes
    )
    programs = max(row_programs(x, M) // parts, 1)
    partials = partial_sums(x, programs, weight, bias)
    dsum, seed, row_scale, dropout_p = branch or (None, None, None, 0.0)
    if branch is None:
        dx, dresidual = None, dx
    _gradients_kernel[(programs * parts,)](
        *(dy, dsum, x, weight, mean, rstd, sums, dx, dresidual, *partials, seed, row_scale, M, N),
        *dropout_numbers(dropout_p),
        PARTS=triton.next_power_of_2(parts),
        ZERO_CENTERED=zero_centered,
        **sizes,
    )
    return partials


def _cut(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, the parts of each, and what each kernel is launched with."""
    N = x.shape[-1]
    return x.numel() // N, triton.cdiv(N, BLOCK), dict(BLOCK_N=BLOCK, num_warps=WARPS)


@triton.jit
def _part(N, BLOCK_N: tl.constexpr):
    """This program's row, part and columns."""
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(N, BLOCK_N)
    part = program % parts
    return program // parts, part, part * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["threshold"])
def _moments_kernel(
    x_ptr,
    residual_ptr,
    total_ptr,
    seed_ptr,
    row_scale_ptr,
    moments_ptr,
    M,
    N,
    threshold,
    scale,
    IS_RMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, part, cols = _part(N, BLOCK_N)
    mask = cols < N
    if residual_ptr is None:
        x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        x = add_branch(
            *(x_ptr, residual_ptr, total_ptr, seed_ptr, row_scale_ptr, row, cols, mask, N),
            *(threshold, scale),
        )
    parts = tl.cdiv(N, BLOCK_N)
    if IS_RMS:
        squares = tl.sum(x * x, axis=0)
    else:
        count = tl.minimum(N - part * BLOCK_N, BLOCK_N).to(tl.float32)
        near = tl.sum(x, axis=0) / count
        centered = tl.where(mask, x - near, 0.0)
        shift = tl.sum(centered, axis=0) / count
        squares = tl.sum(centered * centered, axis=0) - shift * shift * count
        tl.store(moments_ptr + row * parts + part, near + shift)
    tl.store(moments_ptr + (M + row) * parts + part, squares)


@triton.jit
def _joined(moments_ptr, row, M, N, eps, IS_RMS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N):
    """Mean and rstd of a row. Where rows are not centered, mean is 0."""
    part = tl.arange(0, PARTS)
    parts = tl.cdiv(N, BLOCK_N)
    inside = part < parts
    squares = tl.load(moments_ptr + (M + row) * parts + part, mask=inside, other=0.0)
    mean = 0.0
    if not IS_RMS:
        means = tl.load(moments_ptr + row * parts + part, mask=inside, other=0.0)
        counts = tl.where(inside, tl.minimum(N - part * BLOCK_N, BLOCK_N), 0).to(tl.float32)
        near = tl.sum(means * counts, axis=0) / N
        apart = means - near
        shift = tl.sum(apart * counts, axis=0) / N
        squares += (apart - shift) * (apart - shift) * counts
        mean = near + shift
    variance = tl.sum(squares, axis=0) / N
    return mean, tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)


@triton.jit
def _normalize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    moments_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    eps,
    groups,
    S,
    PARTS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, part, cols = _part(N, BLOCK_N)
    mask = cols < N
    mean, rstd = _joined(moments_ptr, row, M, N, eps, mean_ptr is None, PARTS, BLOCK_N)
    if part == 0:
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    at = cols
    if groups is not None:
        at = row % groups * (N // S) + cols // S
    y = scale_and_shift((x - mean) * rstd, weight_ptr, bias_ptr, at, mask, ZERO_CENTERED)
    tl.store(y_ptr + row * N + cols, y, mask=mask)


@triton.jit
def _xhat(x_ptr, mean_ptr, rstd_ptr, row, cols, mask, N):
    """The normalised row, zero past its end, and its rstd."""
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    if mean_ptr is not None:
        x = tl.where(mask, x - tl.load(mean_ptr + row), 0.0)
    return x * rstd, rstd


@triton.jit
def _sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    M,
    N,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, part, cols = _part(N, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    xhat, _ = _xhat(x_ptr, mean_ptr, rstd_ptr, row, cols, mask, N)
    g = dy * load_weight(weight_ptr, cols, mask, ZERO_CENTERED)
    parts = tl.cdiv(N, BLOCK_N)
    if mean_ptr is not None:
        tl.store(sums_ptr + row * parts + part, tl.sum(g, axis=0))
    tl.store(sums_ptr + (M + row) * parts + part, tl.sum(g * xhat, axis=0))


@triton.jit(do_not_specialize=["threshold"])
def _gradients_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    seed_ptr,
    row_scale_ptr,
    M,
    N,
    threshold,
    scale,
    PARTS: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first, _, cols = _part(N, BLOCK_N)
    mask = cols < N
    parts = tl.cdiv(N, BLOCK_N)
    part = tl.arange(0, PARTS)
    weight = load_weight(weight_ptr, cols, mask, ZERO_CENTERED)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(first, M, tl.num_programs(0) // parts):
        dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        xhat, rstd = _xhat(x_ptr, mean_ptr, rstd_ptr, row, cols, mask, N)
        sums = tl.load(sums_ptr + (M + row) * parts + part, mask=part < parts, other=0.0)
        dtotal = dy * weight - xhat * (tl.sum(sums, axis=0) / N)
        if mean_ptr is not None:
            sums = tl.load(sums_ptr + row * parts + part, mask=part < parts, other=0.0)
            dtotal -= tl.sum(sums, axis=0) / N
        store_gradients(
            *(rstd * dtotal, dsum_ptr, dx_ptr, dresidual_ptr, seed_ptr, row_scale_ptr),
            *(row, cols, mask, N, threshold, scale),
        )
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy

    if dweight_ptr is not None:
        tl.store(dweight_ptr + first * N + cols, dweight, mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + first * N + cols, dbias, mask=mask)


_TYPES = {
    **{f"{n}_ptr": "*bf16" for n in ("x", "residual", "total", "weight", "bias", "y")},
    **{f"{n}_ptr": "*bf16" for n in ("dy", "dsum", "dx", "dresidual")},
    **{f"{n}_ptr": "*fp32" for n in ("moments", "sums", "mean", "rstd", "dweight", "dbias")},
    "row_scale_ptr": "*fp32",
    "seed_ptr": "*i64",
    **dict.fromkeys(("M", "N", "threshold", "groups", "S"), "i32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
}


def compiles(*, is_rms: bool, adds: bool = False, grouped: bool = False) -> list[dict]:
    """For an op's COMPILES: the kernels as it launches them, with 128 parts a row."""
    absent = set() if adds else {"residual_ptr", "total_ptr", "dsum_ptr", "dx_ptr"}
    absent |= set() if adds else {"seed_ptr", "row_scale_ptr"}
    absent |= {"mean_ptr", "bias_ptr", "dbias_ptr"} if is_rms else set()
    absent |= set() if grouped else {"groups", "S"}
    constants = {"IS_RMS": is_rms, "PARTS": 128, "ZERO_CENTERED": False, "BLOCK_N": BLOCK}
    forward, backward = (_moments_kernel, _normalize_kernel), (_sums_kernel, _gradients_kernel)
    return [
        dict(
            kernel=kernel,
            signature={
                n: t for n, t in _TYPES.items() if n in kernel.arg_names and n not in absent
            },
            constexprs={
                n: constants.get(n) for n in kernel.arg_names if n in constants or n in absent
            },
            num_warps=WARPS,
            registers=128,
            narrow=dict(
                load=16 if grouped and kernel is _normalize_kernel else 0,
                why="each element of a group looks its channel's weight and bias up",
            ),
        )
        for kernel in (forward if grouped else forward + backward)
    ]
