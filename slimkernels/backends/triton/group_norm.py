"""GroupNorm in Triton: a sample's group of channels is one row, with a weight and bias a channel.

Tiling    Forward holds a row in registers, or cuts it into parts: _long_rows.py. Backward adds up
          each channel of each sample, several short channels a program, and then writes dx in
          parts of rows; a part finds its row's sums from those of the channels. The samples' sums
          are dweight's and dbias' partial sums.
Traffic   forward reads N elements a row (a long one's twice) and writes N; backward reads dy and x
          twice and writes dx. What is read again may come from L2.
Numerics  as in layer_norm.py. No atomics.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton import _long_rows
from slimkernels.backends.triton._common import dense, row_block, unsupported_tensor
from slimkernels.backends.triton._rows import (
    MAX_ROW,
    load_weight,
    normalize,
    parameter_gradients,
    scale_and_shift,
)

TILE = 2048  # elements of the channels that a program adds up, 16 a lane
PART = 2048  # elements of a row of dx
CHANNELS = 64  # of a group, whose sums are added up at once


def unsupported(x, num_groups, weight, bias, eps):
    return unsupported_tensor(x)


def forward(x, num_groups, weight, bias, eps):
    x, weight, bias = x.contiguous(), dense(weight), dense(bias)
    y = torch.empty_like(x)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    M, N, S = _sizes(x, num_groups)
    if x.numel() and N > MAX_ROW:
        rows = x.view(M, N), weight, bias, y, mean, rstd
        _long_rows.forward(*rows, eps, spread=(num_groups, S))
    elif x.numel():
        BLOCK_N, num_warps = row_block(N)
        _forward_kernel[(M,)](
            *(x, weight, bias, y, mean, rstd, num_groups, N, S, eps),
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return y, mean, rstd


def _sizes(x, num_groups):
    """Rows, their length, and the elements of a channel."""
    M = x.shape[0] * num_groups
    return M, x.shape[1:].numel() // num_groups, x.shape[2:].numel()


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    groups,
    N,
    S,
    eps,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * N can pass 2^31
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N

    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    xhat, mean, rstd = normalize(x, mask, N, eps)
    channels = row % groups * (N // S) + cols // S
    y = scale_and_shift(xhat, weight_ptr, bias_ptr, channels, mask, False)
    tl.store(y_ptr + row * N + cols, y, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


def backward(dy, x, weight, bias, mean, rstd):
    dy, x, weight = dy.contiguous(), x.contiguous(), dense(weight)
    samples, groups = mean.shape
    M, N, S = _sizes(x, groups)
    dx = torch.empty_like(x)
    sums = x.new_empty((2, samples, x.shape[1]), dtype=torch.float32)
    if x.numel():
        BLOCK_S = min(triton.next_power_of_2(S), TILE)
        BLOCK_C = TILE // BLOCK_S
        _channel_sums_kernel[(triton.cdiv(sums[0].numel(), BLOCK_C),)](
            *(dy, x, mean, rstd, sums, M, N, S), BLOCK_C=BLOCK_C, BLOCK_S=BLOCK_S, num_warps=4
        )
        _backward_kernel[(M * triton.cdiv(N, PART),)](
            *(dy, x, weight, mean, rstd, sums, dx, groups, M, N, S),
            CHANNELS=CHANNELS,
            BLOCK_N=PART,
            num_warps=4,
        )
    else:
        sums.zero_()
    dbias, dweight = sums
    return dx, *parameter_gradients((dweight, dbias), x, weight, bias)


@triton.jit
def _channel_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    M,
    N,
    S,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # Channels of all samples, (n, c) in one number.
    channels = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    per_row = N // S
    count = tl.cast(M, tl.int64) * per_row
    inside = channels < count
    mean = tl.load(mean_ptr + channels // per_row, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + channels // per_row, mask=inside, other=0.0)
    sum_dy = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    sum_dyx = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)

    for start in range(0, S, BLOCK_S):
        cols = start + tl.arange(0, BLOCK_S)[None, :]
        mask = inside & (cols < S)
        dy = tl.load(dy_ptr + channels * S + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + channels * S + cols, mask=mask, other=0.0).to(tl.float32)
        sum_dy += dy
        sum_dyx += tl.where(mask, dy * ((x - mean) * rstd), 0.0)

    tl.store(sums_ptr + channels, tl.sum(sum_dy, axis=1, keep_dims=True), mask=inside)
    tl.store(sums_ptr + count + channels, tl.sum(sum_dyx, axis=1, keep_dims=True), mask=inside)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,
    dx_ptr,
    groups,
    M,
    N,
    S,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    parts = tl.cdiv(N, BLOCK_N)
    row = program // parts
    per_row = N // S
    first, count = row % groups * per_row, tl.cast(M, tl.int64) * per_row

    # The sums of g = dy * weight and of g * xhat over the row, from those of its channels.
    sum_g = tl.zeros((CHANNELS,), tl.float32)
    sum_gx = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, per_row, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        weight = load_weight(weight_ptr, first + c, c < per_row, False)
        at = sums_ptr + row * per_row + c
        sum_g += weight * tl.load(at, mask=c < per_row, other=0.0)
        sum_gx += weight * tl.load(at + count, mask=c < per_row, other=0.0)
    mean_g, mean_gx = tl.sum(sum_g, axis=0) / N, tl.sum(sum_gx, axis=0) / N

    cols = program % parts * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    xhat = (x - tl.load(mean_ptr + row)) * rstd
    g = dy * load_weight(weight_ptr, first + cols // S, mask, False)
    tl.store(dx_ptr + row * N + cols, rstd * (g - mean_g - xhat * mean_gx), mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **{f"{name}_ptr": "*bf16" for name in ("x", "weight", "bias", "y", "dy", "dx")},
    **{f"{name}_ptr": "*fp32" for name in ("mean", "rstd", "sums")},
    **dict.fromkeys(("groups", "M", "N", "S"), "i32"),
    "eps": "fp32",
}
COMPILES = [
    dict(
        kernel=kernel,
        signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
        constexprs=constants,
        num_warps=warps,
        registers=registers,
        narrow=dict(load=gathered, why="each element looks its channel's weight and bias up"),
    )
    for kernel, constants, warps, registers, gathered in (
        (_forward_kernel, {"BLOCK_N": 1024}, row_block(1024)[1], 64, 32),
        (_forward_kernel, {"BLOCK_N": MAX_ROW}, row_block(MAX_ROW)[1], 128, 32),
        (_channel_sums_kernel, {"BLOCK_C": 1, "BLOCK_S": TILE}, 4, 128, 0),
        (_channel_sums_kernel, {"BLOCK_C": TILE // 64, "BLOCK_S": 64}, 4, 128, 0),
        (_backward_kernel, {"CHANNELS": CHANNELS, "BLOCK_N": PART}, 4, 128, 23),
    )
]
COMPILES += _long_rows.compiles(is_rms=False, grouped=True)
