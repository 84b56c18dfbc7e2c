"""gelu, silu and relu_squared with an optional bias in Triton: y = f(x + bias).

Tiling    Without a bias the tensor is one long row, cut into blocks. With one, a program owns a
          block of columns, so that it loads their bias once; in backward it strides over the rows
          and keeps the columns' dbias in registers: no atomics, the same sum on every run.
Traffic   forward reads and writes each element once, backward reads two and writes one; the slope
          is computed anew. Partials of dbias add 2 * P * N float32.
Numerics  x + bias is float32; _curves.py has the functions.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._common import dense, row_programs, tile_of_rows
from slimkernels.backends.triton._curves import curve_at


def forward(x, bias, curve):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        M, N, launch = _tiles(x, bias, curve)
        blocks = triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(N, launch["BLOCK_N"])
        _forward_kernel[(blocks,)](x, dense(bias), y, M, N, **launch)
    return y


def backward(dy, x, bias, curve):
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if bias is None:
        P, partials = 1, None
    else:
        M = x.numel() // max(x.shape[-1], 1)
        P = row_programs(x, M)
        partials = x.new_empty((P, bias.numel()), dtype=torch.float32)
    if x.numel():
        M, N, launch = _tiles(x, bias, curve)
        grid = (triton.cdiv(N, launch["BLOCK_N"]) * P,)
        _backward_kernel[grid](dy, x, dense(bias), dx, partials, M, N, P, **launch)
    return dx, x.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)


def _tiles(x, bias, curve):
    """Rows, their length, and a tile of 2048 elements."""
    N = x.numel() if bias is None else x.shape[-1]
    BLOCK_M, BLOCK_N = (1, 2048) if bias is None else tile_of_rows(N)
    launch = dict(CURVE=curve, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4)
    return x.numel() // N, N, launch


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    CURVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    # Offsets of the tile in int64: M * N, and without a bias N itself, can pass 2^31.
    rows = (program // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = (program % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (cols < N)
    z = tl.load(x_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y, _ = curve_at(z, CURVE)
    tl.store(y_ptr + rows * N + cols, y, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    dbias_ptr,
    M,
    N,
    P,
    CURVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    share = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    bias = tl.zeros((1, BLOCK_N), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for start in range(share * BLOCK_M, M, P * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)[:, None]
        mask = (rows < M) & (cols < N)
        at = rows * N + cols
        z = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias
        _, slope = curve_at(z, CURVE)
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(dx_ptr + at, dz, mask=mask)
        dbias += dz  # 0 where masked: dy is

    if bias_ptr is not None:
        sums = tl.sum(dbias, axis=0)[None, :]
        tl.store(dbias_ptr + share * N + cols, sums, mask=cols < N)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict.fromkeys(("dy_ptr", "x_ptr", "bias_ptr", "y_ptr", "dx_ptr"), "*bf16"),
    "dbias_ptr": "*fp32",
    **dict.fromkeys(("M", "N", "P"), "i32"),
}


def compiles(*curves):
    """The COMPILES of an op that has these curves."""
    return [
        dict(
            kernel=kernel,
            signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
            constexprs={"CURVE": curve, "BLOCK_M": 4, "BLOCK_N": 512},
            num_warps=4,
            registers=128,
        )
        for kernel in (_forward_kernel, _backward_kernel)
        for curve in curves
    ]
