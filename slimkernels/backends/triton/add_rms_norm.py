"""sum = residual + row_scale * dropout(x), and RMSNorm of the sum, in Triton: a program a row.

Tiling, traffic and numerics are add_layer_norm.py's; nothing is centered, so a row needs one sum.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton import _long_rows
from slimkernels.backends.triton._common import dense, row_block, unsupported_tensor
from slimkernels.backends.triton._residual import (
    add_branch,
    backward_block,
    compiles,
    dropout_numbers,
    longest_row,
    store_gradients,
)
from slimkernels.backends.triton._rows import (
    MAX_ROW,
    empty_partials,
    load_weight,
    parameter_gradients,
    rms_normalize,
    rms_normalize_backward,
    scale_and_shift,
)


def unsupported(x, residual, weight, eps, dropout_p, row_scale, zero_centered):
    return unsupported_tensor(x)


def forward(x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed):
    x, residual, row_scale = x.contiguous(), residual.contiguous(), dense(row_scale)
    weight = dense(weight)
    N = x.shape[-1]
    M = x.numel() // N
    y, total = torch.empty_like(x), torch.empty_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if M and N > MAX_ROW:
        branch = x, residual, seed, row_scale, dropout_p
        _long_rows.forward(*(total, weight, None, y, None, rstd, eps, zero_centered), branch=branch)
    elif M:
        BLOCK_N, num_warps = row_block(N)
        _forward_kernel[(M,)](
            *(x, residual, weight, y, total, rstd, seed, row_scale, N, eps),
            *dropout_numbers(dropout_p),
            ZERO_CENTERED=zero_centered,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return y, total, rstd


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    rstd_ptr,
    seed_ptr,
    row_scale_ptr,
    N,
    eps,
    threshold,
    scale,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * N can pass 2^31
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N

    total = add_branch(
        *(x_ptr, residual_ptr, total_ptr, seed_ptr, row_scale_ptr, row, cols, mask, N),
        *(threshold, scale),
    )
    xhat, rstd = rms_normalize(total, N, eps)
    y = scale_and_shift(xhat, weight_ptr, None, cols, mask, ZERO_CENTERED)
    tl.store(y_ptr + row * N + cols, y, mask=mask)
    tl.store(rstd_ptr + row, rstd)


def backward(
    dy,
    dsum,
    total,
    weight,
    rstd,
    dropout_p,
    row_scale,
    zero_centered,
    seed,
    is_plain_sum,
):
    dy, dsum, total = dy.contiguous(), dense(dsum), total.contiguous()
    weight, row_scale = dense(weight), dense(row_scale)
    N = total.shape[-1]
    M = total.numel() // N
    dresidual = torch.empty_like(total)
    dx = None if is_plain_sum else torch.empty_like(dy)
    is_long = longest_row(total.dtype) < N
    if M and is_long:
        partials = _long_rows.backward(
            *(dy, total, weight, None, None, rstd, dx, zero_centered),
            dresidual=dresidual,
            branch=(dsum, seed, row_scale, dropout_p),
        )[:1]
    else:
        programs, partials = empty_partials(total, M, weight)
    if M and not is_long:
        BLOCK_N, num_warps = backward_block(N, total.dtype)
        _backward_kernel[(programs,)](
            *(dy, dsum, total, weight, rstd, dx, dresidual, *partials),
            *(seed, row_scale, M, N, *dropout_numbers(dropout_p)),
            ZERO_CENTERED=zero_centered,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    dx = total.new_empty(0) if dx is None else dx
    return dx, dresidual, *parameter_gradients(partials, total, weight)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(
    dy_ptr,
    dsum_ptr,
    total_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    seed_ptr,
    row_scale_ptr,
    M,
    N,
    threshold,
    scale,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    weight = load_weight(weight_ptr, cols, mask, ZERO_CENTERED)
    dweight = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(program, M, tl.num_programs(0)):
        dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        dtotal, xhat = rms_normalize_backward(dy, total, weight, rstd, N)
        store_gradients(
            *(dtotal, dsum_ptr, dx_ptr, dresidual_ptr, seed_ptr, row_scale_ptr),
            *(row, cols, mask, N, threshold, scale),
        )
        if dweight_ptr is not None:
            dweight += dy * xhat

    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * N + cols, dweight, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
COMPILES = compiles(_forward_kernel, _backward_kernel)
COMPILES += _long_rows.compiles(is_rms=True, adds=True)
