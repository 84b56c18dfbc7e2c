"""GELU with an optional bias in Triton: y = z Phi(z), z = x + bias.

Tiling    Without a bias the tensor is one long row, cut into blocks. With one, a program owns a
          block of columns, so that it loads their bias once; in backward it strides over the rows
          and keeps the columns' dbias in registers: no atomics, the same sum on every run.
Traffic   forward reads and writes each element once, backward reads two and writes one; Phi is
          recomputed. Partials of dbias add 2 * P * N float32.
Numerics  z is float32. Phi(-|z|) is exp(-z^2 / 2) times a polynomial, which keeps its relative
          accuracy where 1 + erf has no digit left; csrc/cpu/vec.h derives it. (1 + tanh(u)) / 2
          is the logistic function of 2 u, from exp(-2 |u|), which cannot overflow.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._common import dense, row_programs, unsupported_tensor


def unsupported(x, bias, approximate):
    return unsupported_tensor(x)


def forward(x, bias, approximate):
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        M, N, launch = _tiles(x, bias, approximate)
        blocks = triton.cdiv(M, launch["BLOCK_M"]) * triton.cdiv(N, launch["BLOCK_N"])
        _forward_kernel[(blocks,)](x, dense(bias), y, M, N, **launch)
    return y


def backward(dy, x, bias, approximate):
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    if bias is None:
        P, partials = 1, None
    else:
        M = x.numel() // max(x.shape[-1], 1)
        P = row_programs(x, M)
        partials = x.new_empty((P, bias.numel()), dtype=torch.float32)
    if x.numel():
        M, N, launch = _tiles(x, bias, approximate)
        grid = (triton.cdiv(N, launch["BLOCK_N"]) * P,)
        _backward_kernel[grid](dy, x, dense(bias), dx, partials, M, N, P, **launch)
    return dx, x.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)


def _tiles(x, bias, approximate):
    """Rows, their length, and a tile of 2048 elements: 16 a lane, enough loads in flight."""
    N = x.numel() if bias is None else x.shape[-1]
    BLOCK_N = min(max(triton.next_power_of_2(N), 16), 2048 if bias is None else 512)
    BLOCK_M = 1 if bias is None else 2048 // BLOCK_N
    is_tanh = approximate == "tanh"
    return (
        x.numel() // N,
        N,
        dict(IS_TANH=is_tanh, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4),
    )


@triton.jit
def _normal(z):
    """Phi(z) and exp(-z^2 / 2): csrc/cpu/vec.h, normal()."""
    a = tl.minimum(tl.abs(z), 15.0)
    r = 1.0 / (a + 3.5)
    t = (a - 3.5) * r
    p = 1.10689398e-4 * t + 4.21897857e-4
    p = p * t - 4.94943699e-4
    p = p * t - 3.17531079e-3
    p = p * t + 6.49311580e-3
    p = p * t + 1.74063779e-2
    p = p * t - 1.16053037e-1
    p = p * t + 3.15425038e-1
    p = p * t - 5.65561771e-1
    p = p * t + 7.44416058e-1
    e = tl.exp(-0.5 * a * a)
    beyond = e * p * r
    return tl.where(z < 0.0, beyond, 1.0 - beyond), e


@triton.jit
def _logistic(u):
    """1 / (1 + exp(-u)) and its slope."""
    e = tl.exp(-tl.abs(u))
    q = 1.0 / (1.0 + e)
    return tl.where(u < 0.0, e * q, q), e * q * q


@triton.jit
def _value(z, IS_TANH: tl.constexpr):
    if IS_TANH:
        # 2 sqrt(2 / pi) (z + 0.044715 z^3)
        share, _ = _logistic(z * (1.595769122 + 0.0713548163 * z * z))
    else:
        share, _ = _normal(z)
    return z * share


@triton.jit
def _slope(z, IS_TANH: tl.constexpr):
    if IS_TANH:
        share, steepness = _logistic(z * (1.595769122 + 0.0713548163 * z * z))
        slope = share + z * steepness * (1.595769122 + 0.2140644488 * z * z)
    else:
        share, e = _normal(z)
        slope = share + z * e * 0.398942280
    return slope


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    IS_TANH: tl.constexpr,
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
    tl.store(y_ptr + rows * N + cols, _value(z, IS_TANH), mask=mask)


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
    IS_TANH: tl.constexpr,
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
        dz = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32) * _slope(z, IS_TANH)
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
COMPILES = [
    dict(
        kernel=kernel,
        signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
        constexprs={"IS_TANH": is_tanh, "BLOCK_M": 4, "BLOCK_N": 512},
        num_warps=4,
        registers=128,
    )
    for kernel in (_forward_kernel, _backward_kernel)
    for is_tanh in (False, True)
]
