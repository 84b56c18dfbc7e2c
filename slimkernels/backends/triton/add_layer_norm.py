"""sum = residual + dropout(x), and LayerNorm of the sum, in Triton: one program per row.

Tiling    as in layer_norm.py: a row in registers, in backward a few programs per multiprocessor.
Traffic   forward reads 2 N and writes 2 N elements a row. Backward reads 2 N, or 3 N with a
          gradient of the sum, and writes N, or 2 N with dropout. Dropout stores nothing: backward
          draws its bits again. The roof is DRAM bandwidth.
Numerics  the statistics are those of the sum as stored, so y is exactly layer_norm(sum). dx comes
          from dresidual before it is rounded.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends._dropout import threshold
from slimkernels.backends.triton._common import dense, keep_mask, row_block, row_keys
from slimkernels.backends.triton._rows import (
    MAX_ROW,
    empty_partials,
    load_weight,
    normalize,
    normalize_backward,
    parameter_gradients,
    unsupported_row,
)


def unsupported(x, residual, weight, bias, eps, dropout_p):
    return unsupported_row(x)


def forward(x, residual, weight, bias, eps, dropout_p, seed):
    x, residual = x.contiguous(), residual.contiguous()
    N = x.shape[-1]
    M = x.numel() // N
    y, total = torch.empty_like(x), torch.empty_like(x)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if M:
        BLOCK_N, num_warps = row_block(N)
        _forward_kernel[(M,)](
            *(x, residual, dense(weight), dense(bias), y, total, mean, rstd, seed, N, eps),
            *_dropout(dropout_p),
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return y, total, mean, rstd


def backward(dy, dsum, total, weight, bias, mean, rstd, dropout_p, seed):
    dy, dsum, total = dy.contiguous(), dense(dsum), total.contiguous()
    N = total.shape[-1]
    M = total.numel() // N
    dresidual = torch.empty_like(total)
    dx = None if seed is None else torch.empty_like(total)
    partials = empty_partials(total, M)
    if M:
        BLOCK_N, num_warps = row_block(N)
        _backward_kernel[(partials.shape[1],)](
            *(dy, dsum, total, dense(weight), mean, rstd, dx, dresidual, *partials, seed, M, N),
            *_dropout(dropout_p),
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    dx = total.new_empty(0) if dx is None else dx
    return dx, dresidual, *parameter_gradients(partials, total, weight, bias)


def _dropout(dropout_p):
    """Below which bits an element is dropped, and what survivors are multiplied by."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    N,
    eps,
    threshold,
    scale,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * N can pass 2^31
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    at = row * N + cols

    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        key0, key1 = row_keys(seed_ptr, row)
        x = tl.where(keep_mask(key0, key1, cols, threshold), x * scale, 0.0)
    total = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32) + x
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=mask)

    y, mean, rstd = normalize(total.to(tl.float32), weight_ptr, bias_ptr, cols, mask, N, eps)
    tl.store(y_ptr + at, y, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dsum_ptr,
    total_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    seed_ptr,
    M,
    N,
    threshold,
    scale,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    weight = load_weight(weight_ptr, cols, mask, BLOCK_N)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(program, M, tl.num_programs(0)):
        at = row * N + cols
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        dresidual, xhat = normalize_backward(dy, total, weight, mean, rstd, mask, N)
        if dsum_ptr is not None:
            dresidual += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + at, dresidual, mask=mask)
        if seed_ptr is not None:
            key0, key1 = row_keys(seed_ptr, tl.cast(row, tl.int64))
            dx = tl.where(keep_mask(key0, key1, cols, threshold), dresidual * scale, 0.0)
            tl.store(dx_ptr + at, dx, mask=mask)
        dweight += dy * xhat
        dbias += dy

    tl.store(dweight_ptr + program * N + cols, dweight, mask=mask)
    tl.store(dbias_ptr + program * N + cols, dbias, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TENSORS = ("x", "residual", "weight", "bias", "y", "total", "dy", "dsum", "dx", "dresidual")
_TYPES = {
    **{f"{name}_ptr": "*bf16" for name in _TENSORS},
    **dict.fromkeys(("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"), "*fp32"),
    "seed_ptr": "*i64",
    **dict.fromkeys(("M", "N", "threshold"), "i32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
}
_OPTIONAL = ("weight_ptr", "bias_ptr", "dsum_ptr", "dx_ptr", "seed_ptr")
COMPILES = [
    dict(
        kernel=kernel,
        signature={n: t for n, t in _TYPES.items() if n in kernel.arg_names and n not in absent},
        constexprs={"BLOCK_N": BLOCK_N, **{n: None for n in absent if n in kernel.arg_names}},
        num_warps=row_block(BLOCK_N)[1],
        registers=registers if BLOCK_N == 1024 else 255,
    )
    for kernel, registers in ((_forward_kernel, 64), (_backward_kernel, 168))
    for absent in ((), _OPTIONAL)
    for BLOCK_N in (1024, MAX_ROW)
]
