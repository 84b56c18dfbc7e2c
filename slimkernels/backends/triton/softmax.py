"""Softmax of rows in Triton: y = exp(s - max(s)) / sum(exp(s - max(s))), s = x * scale.

Tiling    Rows of up to MAX_TILE elements stay in registers, several short ones a program. A longer
          row is walked in blocks by one program, twice: for its maximum and sum, and to be written.
Traffic   forward reads N and writes N elements a row, backward reads 2 N and writes N: the roof is
          DRAM bandwidth. A long row is read again for the second walk, and may come from L2. What
          causality or the mask hides is not read. The mask is read through its strides, so rows
          that share one find it in the caches.
Numerics  float32. Subtracting the row's maximum bounds exp by 1; over blocks the sum so far is
          rescaled when the maximum rises. A row whose scores are all -inf is NaN, as in torch; one
          that sees nothing is zero.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends._mask import mask_rows
from slimkernels.backends.triton._common import unsupported_tensor

TILE = 2048  # elements of several short rows: 16 a lane
MAX_TILE = 16384  # the longest row held in registers: 32 elements a lane in each of two tensors
BLOCK = 4096  # of a longer row
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def unsupported(x, scale, mask, is_causal):
    return unsupported_tensor(x)


def forward(x, scale, mask, is_causal):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        N = x.shape[-1]
        M = x.numel() // N
        period = x.shape[-2] if is_causal else None
        if N <= MAX_TILE:
            grid, launch = _tiles(M, N)
            _forward_kernel[grid](x, *_mask(mask), y, M, N, period, scale, **launch)
        else:
            _forward_long_kernel[(M,)](x, *_mask(mask), y, N, period, scale, **_blocks())
    return y


def backward(dy, y, scale):
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    if y.numel():
        N = y.shape[-1]
        M = y.numel() // N
        if N <= MAX_TILE:
            grid, launch = _tiles(M, N)
            _backward_kernel[grid](dy, y, dx, M, N, scale, **launch)
        else:
            _backward_long_kernel[(M,)](dy, y, dx, N, scale, **_blocks())
    return dx


def _tiles(M, N):
    """The programs that share M rows, and how many rows each holds whole."""
    BLOCK_N = max(triton.next_power_of_2(N), 16)
    BLOCK_M = max(TILE // BLOCK_N, 1)
    launch = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=_warps(BLOCK_M * BLOCK_N))
    return (triton.cdiv(M, BLOCK_M),), launch


def _blocks():
    return dict(BLOCK_N=BLOCK, num_warps=_warps(BLOCK))


def _warps(tile):
    return min(max(tile // (32 * 16), 1), 16)


def _mask(mask):
    """The mask as bytes, and where its rows begin: slimkernels/backends/_mask.py."""
    if mask is None:
        return (None,) * 7
    mask, *places = mask_rows(mask)
    return mask.view(torch.uint8), *places


@triton.jit
def _mask_starts(rows, middle, inner, stride_outer, stride_middle, stride_inner):
    """Where the rows of the mask begin: slimkernels/backends/_mask.py."""
    blocks = rows // inner
    starts = blocks // middle * stride_outer + blocks % middle * stride_middle
    return starts + rows % inner * stride_inner


@triton.jit
def _scores(x_ptrs, mask_ptrs, inside, seen, scale):
    """The scores, -inf where hidden, and what is to be their maximum.

    There a seen -inf counts as the lowest number: a maximum of -inf is a row that sees nothing.
    Loads do not ask what is hidden: they are 16 bytes wide where that changes in steps of 16
    elements, as the ends of rows do.
    """
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    if mask_ptrs is not None:
        seen = seen & (tl.load(mask_ptrs, mask=inside, other=0) != 0)
    s = tl.where(seen, x * scale, -float("inf"))
    # Not tl.maximum: of NaN it makes NaN in the interpreter, which tl.max would pass over.
    return s, tl.where(seen, tl.where(s > LOWEST, s, LOWEST), s)


@triton.jit
def _forward_kernel(
    x_ptr,
    mask_ptr,
    middle,
    inner,
    stride_outer,
    stride_middle,
    stride_inner,
    stride_col,
    y_ptr,
    M,
    N,
    period,
    scale,
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
    if mask_ptr is not None:
        starts = _mask_starts(rows, middle, inner, stride_outer, stride_middle, stride_inner)
        mask_ptrs = mask_ptr + starts + cols * stride_col
    s, tops = _scores(x_ptr + at, mask_ptrs, inside, seen, scale)

    peak = tl.max(tops, axis=1, keep_dims=True)
    e = tl.exp(s - peak)
    # Rounded once: backward takes the difference of two numbers as great as y.
    y = tl.div_rn(e, tl.broadcast_to(tl.sum(e, axis=1, keep_dims=True), e.shape))
    if mask_ptr is not None:
        y = tl.where(peak == -float("inf"), 0.0, y)
    tl.store(y_ptr + at, y, mask=whole)


@triton.jit
def _forward_long_kernel(
    x_ptr,
    mask_ptr,
    middle,
    inner,
    stride_outer,
    stride_middle,
    stride_inner,
    stride_col,
    y_ptr,
    N,
    period,
    scale,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = row * N
    end = begin + N
    seen_end = end
    if period is not None:
        seen_end = tl.minimum(begin + row % period + 1, end)
    if mask_ptr is not None:
        mask_ptr += _mask_starts(row, middle, inner, stride_outer, stride_middle, stride_inner)

    peak = -float("inf")
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, seen_end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        mask_ptrs = None if mask_ptr is None else mask_ptr + (at - begin) * stride_col
        s, tops = _scores(x_ptr + at, mask_ptrs, at < end, at < seen_end, scale)
        raised = tl.maximum(peak, tl.max(tops, axis=0))
        # While nothing is seen, it adds exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp(peak - shift) + tl.exp(s - shift)
        peak = raised

    total = tl.sum(total, axis=0)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        mask_ptrs = None if mask_ptr is None else mask_ptr + (at - begin) * stride_col
        reach = tl.where(start < seen_end, end, begin)  # past what is seen nothing is read
        s, _ = _scores(x_ptr + at, mask_ptrs, at < reach, at < seen_end, scale)
        y = tl.where(peak == -float("inf"), 0.0, tl.div_rn(tl.exp(s - peak), total))
        tl.store(y_ptr + at, y, mask=at < end)


@triton.jit
def _backward_kernel(
    dy_ptr, y_ptr, dx_ptr, M, N, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    at = rows * N + cols
    mask = (rows < M) & (cols < N)
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dot = tl.sum(dy * y, axis=1, keep_dims=True)
    tl.store(dx_ptr + at, scale * y * (dy - dot), mask=mask)


@triton.jit
def _backward_long_kernel(dy_ptr, y_ptr, dx_ptr, N, scale, BLOCK_N: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * N
    end = begin + N
    dots = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        dots += dy * y
    dot = tl.sum(dots, axis=0)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=at < end, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, scale * y * (dy - dot), mask=at < end)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_PLACES = ("middle", "inner", "stride_outer", "stride_middle", "stride_inner", "stride_col")
_TYPES = {
    **dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), "*bf16"),
    "mask_ptr": "*u8",
    **dict.fromkeys((*_PLACES, "M", "N", "period"), "i32"),
    "scale": "fp32",
}
_PLAIN = dict.fromkeys(("mask_ptr", *_PLACES, "period"))
_MASKED = {"stride_col": 1}
COMPILES = [
    dict(
        kernel=kernel,
        signature={
            name: t for name, t in _TYPES.items() if name in kernel.arg_names and name not in given
        },
        constexprs=given | tile,
        num_warps=warps,
        registers=registers,
    )
    for kernels, tile, warps, registers in (
        (
            (_forward_kernel, _backward_kernel),
            {"BLOCK_M": 4, "BLOCK_N": TILE // 4},
            _warps(TILE),
            64,
        ),
        ((_forward_kernel, _backward_kernel), {"BLOCK_M": 1, "BLOCK_N": MAX_TILE}, 16, 96),
        ((_forward_long_kernel, _backward_long_kernel), {"BLOCK_N": BLOCK}, _warps(BLOCK), 96),
    )
    for kernel, given in ((kernels[0], _PLAIN), (kernels[0], _MASKED), (kernels[1], {}))
]
