"""What is added to a residual stream before a norm, residual + row_scale * dropout(x), and back."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from slimkernels.backends._dropout import threshold
from slimkernels.backends.triton._common import keep_mask, row_block, row_keys
from slimkernels.backends.triton._rows import MAX_ROW


def longest_row(dtype: torch.dtype) -> int:
    """Elements of the longest row that backward holds whole: more float32 ones spill registers."""
    return MAX_ROW * 2 // dtype.itemsize


def backward_block(N: int, dtype: torch.dtype) -> tuple[int, int]:
    """row_block for backward, which needs more registers where the stream is float32."""
    block, warps = row_block(N)
    return block, min(warps * dtype.itemsize // 2, 16)


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """Below which bits an element is dropped, and what survivors are multiplied by."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


@triton.jit
def drop_and_scale(x, seed_ptr, row_scale_ptr, row, cols, threshold, scale):
    """row_scale * dropout(x), and as well what becomes of a gradient on its way back."""
    if seed_ptr is not None:
        key0, key1 = row_keys(seed_ptr, tl.cast(row, tl.int64))
        x = tl.where(keep_mask(key0, key1, cols, threshold), x * scale, 0.0)
    if row_scale_ptr is not None:
        x *= tl.load(row_scale_ptr + row)
    return x


@triton.jit
def add_branch(
    x_ptr, residual_ptr, total_ptr, seed_ptr, row_scale_ptr, row, cols, mask, N, threshold, scale
):
    """Stores the sum of a row, and returns it as stored."""
    at = row * N + cols
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = drop_and_scale(x, seed_ptr, row_scale_ptr, row, cols, threshold, scale)
    total = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32) + x
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + at, total, mask=mask)
    return total.to(tl.float32)


@triton.jit
def store_gradients(
    dtotal,
    dsum_ptr,
    dx_ptr,
    dresidual_ptr,
    seed_ptr,
    row_scale_ptr,
    row,
    cols,
    mask,
    N,
    threshold,
    scale,
):
    """Stores a row of dresidual, and of dx unless that is the same.

    dtotal  of the row's sum, by way of the norm; dsum_ptr has what flows into the sum besides
    """
    at = row * N + cols
    if dsum_ptr is not None:
        dtotal += tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dresidual_ptr + at, dtotal, mask=mask)
    if dx_ptr is not None:
        dx = drop_and_scale(dtotal, seed_ptr, row_scale_ptr, row, cols, threshold, scale)
        tl.store(dx_ptr + at, dx, mask=mask)


_TENSORS = ("x", "residual", "weight", "bias", "y", "total", "dy", "dsum", "dx", "dresidual")
_FLOAT32 = ("mean", "rstd", "dweight", "dbias", "row_scale")
_TYPES = {
    **{f"{name}_ptr": "*bf16" for name in _TENSORS},
    **{f"{name}_ptr": "*fp32" for name in _FLOAT32},
    "seed_ptr": "*i64",
    **dict.fromkeys(("M", "N", "threshold"), "i32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
}
_WIDE = {f"{name}_ptr": "*fp32" for name in ("residual", "total", "dsum", "dresidual")}
_OPTIONAL = ("weight_ptr", "bias_ptr", "dsum_ptr", "dx_ptr", "seed_ptr", "row_scale_ptr")
_OPTIONAL += ("dweight_ptr", "dbias_ptr")


def compiles(forward_kernel, backward_kernel) -> list[dict]:
    """What tests/test_aot.py compiles of an op's two kernels, and the most that may come out."""
    return [
        dict(
            kernel=kernel,
            signature={n: t for n, t in types.items() if n in kernel.arg_names and n not in absent},
            constexprs={
                **{"ZERO_CENTERED": False, "BLOCK_N": BLOCK_N},
                **{n: None for n in absent if n in kernel.arg_names},
            },
            num_warps=block(BLOCK_N)[1],
            registers=registers if BLOCK_N == 1024 else 255,
        )
        for types, absent, dtype in (
            (_TYPES, (), torch.bfloat16),
            (_TYPES, _OPTIONAL, torch.bfloat16),
            (_TYPES | _WIDE, (), torch.float32),
        )
        for kernel, block, longest, registers in (
            (forward_kernel, row_block, MAX_ROW, 64),
            (
                backward_kernel,
                functools.partial(backward_block, dtype=dtype),
                longest_row(dtype),
                168,
            ),
        )
        for BLOCK_N in (1024, longest)
    ]
