"""y = residual + dropout(x + bias) in Triton, the bias and the residual optional.

Tiling    A program owns a tile of rows and columns; in backward it strides over the rows and keeps
          its columns' dbias in registers: no atomics, the same sum on every run.
Traffic   forward reads two elements and writes one; backward reads and writes one, or only reads
          it where nothing was dropped: dx is then dy. Dropout stores nothing: backward draws its
          bits again. Partials of dbias add 2 * P * N float32.
Numerics  float32 up to y, which is rounded once.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._common import (
    dense,
    row_programs,
    tile_of_rows,
    unsupported_tensor,
)
from slimkernels.backends.triton._residual import drop_and_scale, dropout_numbers


def unsupported(x, bias, residual, dropout_p):
    return unsupported_tensor(x)


def forward(x, bias, residual, dropout_p, seed):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        M, N, launch = _tiles(x)
        blocks = triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(N, launch["BLOCK_N"])
        _forward_kernel[(blocks,)](
            *(x, dense(bias), dense(residual), y, seed, M, N), *dropout_numbers(dropout_p), **launch
        )
    return y


def backward(dy, bias, dropout_p, seed):
    dy = dy.contiguous()
    dx = None if seed is None else torch.empty_like(dy)
    M, N, launch = _tiles(dy)
    P = row_programs(dy, M)
    partials = None if bias is None else dy.new_empty((P, N), dtype=torch.float32)
    if dy.numel():
        grid = (triton.cdiv(N, launch["BLOCK_N"]) * P,)
        _backward_kernel[grid](
            *(dy, dx, partials, seed, M, N, P), *dropout_numbers(dropout_p), **launch
        )
    dx = dy.new_empty(0) if dx is None else dx
    return dx, dy.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)


def _tiles(x):
    N = x.shape[-1]
    BLOCK_M, BLOCK_N = tile_of_rows(N)
    return x.numel() // max(N, 1), N, dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4)


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    seed_ptr,
    M,
    N,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    # int64: M * N can pass 2^31.
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    at = rows * N + cols
    y = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = drop_and_scale(y, seed_ptr, None, rows, cols, threshold, scale)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y, mask=mask)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(
    dy_ptr,
    dx_ptr,
    dbias_ptr,
    seed_ptr,
    M,
    N,
    P,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    share = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for start in range(share * BLOCK_M, M, P * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        at = rows * N + cols
        dx = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dx = drop_and_scale(dx, seed_ptr, None, rows, cols, threshold, scale)
        if dx_ptr is not None:
            tl.store(dx_ptr + at, dx, mask=mask)
        dbias += dx  # 0 where masked: dy is

    if dbias_ptr is not None:
        sums = tl.sum(dbias, axis=0)[None, :]
        tl.store(dbias_ptr + share * N + cols, sums, mask=cols < N)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict.fromkeys((f"{t}_ptr" for t in ("x", "bias", "residual", "y", "dy", "dx")), "*bf16"),
    **{"dbias_ptr": "*fp32", "seed_ptr": "*i64", "scale": "fp32"},
    **dict.fromkeys(("M", "N", "P", "threshold"), "i32"),
}
COMPILES = [
    dict(
        kernel=kernel,
        signature={n: t for n, t in _TYPES.items() if n in kernel.arg_names and n not in absent},
        constexprs={
            **{"BLOCK_M": 4, "BLOCK_N": 512},
            **{n: None for n in absent if n in kernel.arg_names},
        },
        num_warps=4,
        registers=128,
    )
    for kernel in (_forward_kernel, _backward_kernel)
    for absent in ((), ("seed_ptr", "dx_ptr"))
]
