"""The arithmetic of one normalised row, and the sums over rows that its parameters' gradients are.

layer_norm.py and add_layer_norm.py differ in what they normalise and share how. A row is held in
registers, float32, zero in the lanes past its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends.triton._common import row_programs, unsupported_tensor

# Elements. Backward of longer bfloat16 rows spills its registers; of this many float32 ones,
# add_layer_norm's spills 100 bytes.
MAX_ROW = 8192


def unsupported_row(x: Tensor) -> str | None:
    """The refusals of an op that holds whole rows of x."""
    if x.shape[-1] > MAX_ROW:
        return f"a row may have at most {MAX_ROW} elements and has {x.shape[-1]}"
    return unsupported_tensor(x)


def empty_partials(x: Tensor, M: int) -> Tensor:
    """(2, P, N) float32: dweight and dbias of each of the P programs that share M rows."""
    return x.new_empty((2, row_programs(x, M), x.shape[-1]), dtype=torch.float32)


def parameter_gradients(
    partials: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """dweight and dbias in their parameter's dtype; empty where it was not given."""
    return tuple(
        x.new_empty(0) if p is None else total.to(p.dtype, copy=True)
        for p, total in zip((weight, bias), partials.sum(1), strict=True)
    )


@triton.jit
def normalize(x, weight_ptr, bias_ptr, cols, mask, N, eps):
    """y = (x - mean) * rstd * weight + bias, mean and rstd."""
    near = tl.sum(x, axis=0) / N
    # Masked lanes hold -near here; unmasked they would enter the variance.
    centered = tl.where(mask, x - near, 0.0)
    # A sum near 1000 is off by 3e-5, which centering shows: what is left corrects both moments.
    shift = tl.sum(centered, axis=0) / N
    variance = tl.sum(centered * centered, axis=0) / N - shift * shift
    rstd = tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)

    y = (centered - shift) * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return y, near + shift, rstd


@triton.jit
def load_weight(weight_ptr, cols, mask, BLOCK_N: tl.constexpr):
    """The weight that all rows share; 1 where there is none."""
    weight = tl.full((BLOCK_N,), 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return weight


@triton.jit
def normalize_backward(dy, x, weight, mean, rstd, mask, N):
    """dx, and xhat = (x - mean) * rstd, by which dy becomes its share of dweight."""
    xhat = tl.where(mask, (x - mean) * rstd, 0.0)
    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with g = dy * weight
    g = dy * weight
    dx = rstd * (g - tl.sum(g, axis=0) / N - xhat * (tl.sum(g * xhat, axis=0) / N))
    return dx, xhat
