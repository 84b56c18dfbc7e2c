"""RMSNorm in Triton: one program per row, the row held in registers.

Tiling and traffic are layer_norm.py's; nothing is centered, so a row needs one sum, not three.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton import _long_rows
from slimkernels.backends.triton._common import dense, row_block, unsupported_tensor
from slimkernels.backends.triton._rows import (
    MAX_ROW,
    empty_partials,
    load_weight,
    parameter_gradients,
    rms_normalize,
    rms_normalize_backward,
    scale_and_shift,
)


def unsupported(x, weight, eps, zero_centered):
    return unsupported_tensor(x)


def forward(x, weight, eps, zero_centered):
    x, weight = x.contiguous(), dense(weight)
    N = x.shape[-1]
    M = x.numel() // N
    y = torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if M and N > MAX_ROW:
        _long_rows.forward(x, weight, None, y, None, rstd, eps, zero_centered)
    elif M:
        BLOCK_N, num_warps = row_block(N)
        _forward_kernel[(M,)](
            *(x, weight, y, rstd, N, eps),
            ZERO_CENTERED=zero_centered,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return y, rstd


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    N,
    eps,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * N can pass 2^31
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N

    x = tl.load(x_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    xhat, rstd = rms_normalize(x, N, eps)
    y = scale_and_shift(xhat, weight_ptr, None, cols, mask, ZERO_CENTERED)
    tl.store(y_ptr + row * N + cols, y, mask=mask)
    tl.store(rstd_ptr + row, rstd)


def backward(dy, x, weight, rstd, zero_centered):
    dy, x, weight = dy.contiguous(), x.contiguous(), dense(weight)
    N = x.shape[-1]
    M = x.numel() // N
    dx = torch.empty_like(x)
    if M and N > MAX_ROW:
        partials = _long_rows.backward(dy, x, weight, None, None, rstd, dx, zero_centered)
        return dx, *parameter_gradients(partials[:1], x, weight)
    programs, partials = empty_partials(x, M, weight)
    if M:
        BLOCK_N, num_warps = row_block(N)
        _backward_kernel[(programs,)](
            *(dy, x, weight, rstd, dx, *partials, M, N),
            ZERO_CENTERED=zero_centered,
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return dx, *parameter_gradients(partials, x, weight)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    M,
    N,
    ZERO_CENTERED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    weight = load_weight(weight_ptr, cols, mask, ZERO_CENTERED)
    dweight = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(program, M, tl.num_programs(0)):
        at = row * N + cols
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dx, xhat = rms_normalize_backward(dy, x, weight, tl.load(rstd_ptr + row), N)
        tl.store(dx_ptr + at, dx, mask=mask)
        if dweight_ptr is not None:
            dweight += dy * xhat

    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * N + cols, dweight, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **{f"{name}_ptr": "*bf16" for name in ("x", "y", "dy", "dx")},
    **dict.fromkeys(("weight_ptr", "rstd_ptr", "dweight_ptr"), "*fp32"),
    **dict.fromkeys(("M", "N"), "i32"),
    "eps": "fp32",
}
COMPILES = [
    dict(
        kernel=kernel,
        signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
        constexprs={"ZERO_CENTERED": False, "BLOCK_N": BLOCK_N},
        num_warps=row_block(BLOCK_N)[1],
        registers=registers if BLOCK_N == 1024 else 255,
    )
    for kernel, registers in ((_forward_kernel, 64), (_backward_kernel, 128))
    for BLOCK_N in (1024, MAX_ROW)
]
COMPILES += _long_rows.compiles(is_rms=True)
