"""swiglu and geglu in Triton: y = f(gate) * up.

Tiling    A program owns a tile of rows and columns. Strides from row to row let gate and up, and
          their gradients, be halves of one packed tensor.
Traffic   forward reads two elements and writes one, backward reads three and writes two; f and its
          slope are computed anew, from one exponential.
Numerics  f(gate) is float32 and not rounded before it is multiplied; _curves.py has f.
"""

import triton
import triton.language as tl

from slimkernels.backends._gated import empty_gradients, gate_and_up
from slimkernels.backends.triton._common import tile_of_rows
from slimkernels.backends.triton._curves import curve_at


def forward(x, gate, curve):
    gate, up = gate_and_up(x, gate)
    M, N = up.shape
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel():
        grid, launch = _launch(M, N, curve)
        _forward_kernel[grid](gate, up, y, M, N, gate.stride(0), up.stride(0), **launch)
    return y


def backward(dy, x, gate, curve):
    dx, dgate, *to = empty_gradients(x, gate)
    gate, up = gate_and_up(x, gate)
    M, N = up.shape
    if up.numel():
        grid, launch = _launch(M, N, curve)
        strides = gate.stride(0), up.stride(0), to[0].stride(0)
        _backward_kernel[grid](dy.contiguous(), gate, up, *to, M, N, *strides, **launch)
    return dx, dgate


def _launch(M, N, curve):
    BLOCK_M, BLOCK_N = tile_of_rows(N)
    grid = (triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)
    return grid, dict(CURVE=curve, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows, columns and mask of this program; int64, since M * N can pass 2^31."""
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, cols, (rows < M) & (cols < N)


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    M,
    N,
    gate_stride,
    up_stride,
    CURVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    gate = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, _ = curve_at(gate, CURVE)
    tl.store(y_ptr + rows * N + cols, value * up, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    M,
    N,
    gate_stride,
    up_stride,
    gradient_stride,
    CURVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, cols, mask = _tile(M, N, BLOCK_M, BLOCK_N)
    dy = tl.load(dy_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    value, slope = curve_at(gate, CURVE)
    at = rows * gradient_stride + cols
    tl.store(dgate_ptr + at, dy * up * slope, mask=mask)
    tl.store(dup_ptr + at, dy * value, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict.fromkeys(("dy_ptr", "gate_ptr", "up_ptr", "y_ptr", "dgate_ptr", "dup_ptr"), "*bf16"),
    **dict.fromkeys(("M", "N", "gate_stride", "up_stride", "gradient_stride"), "i32"),
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
