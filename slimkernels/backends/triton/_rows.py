"""The arithmetic of one normalised row, and the sums over rows that its parameters' gradients are.

The norms differ in what they normalise and share how. A row is held in registers, float32, zero in
the lanes past its end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends.triton._common import row_programs

# Elements. Backward of longer bfloat16 rows spills its registers; _long_rows.py takes those.
MAX_ROW = 8192


def empty_partials(
    x: Tensor, M: int, *parameters: Tensor | None
) -> tuple[int, list[Tensor | None]]:
    """P, the programs that share M rows, and for each parameter (P, N) float32 partial gradients.

    None for a parameter that was not given.
    """
    programs = row_programs(x, M)
    return programs, partial_sums(x, programs, *parameters)


def partial_sums(x: Tensor, programs: int, *parameters: Tensor | None) -> list[Tensor | None]:
    size = programs, x.shape[-1]
    return [None if p is None else x.new_empty(size, dtype=torch.float32) for p in parameters]


def parameter_gradients(
    partials: list[Tensor | None], x: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    """The parameters' gradients in their dtypes; empty where one was not given."""
    return tuple(
        x.new_empty(0) if p is None else partial.sum(0).to(p.dtype)
        for p, partial in zip(parameters, partials, strict=True)
    )


@triton.jit
def normalize(x, mask, N, eps):
    """xhat = (x - mean) * rstd, mean and rstd: LayerNorm."""
    near = tl.sum(x, axis=0) / N
    # Masked lanes hold -near here; unmasked they would enter the variance.
    centered = tl.where(mask, x - near, 0.0)
    # A sum near 1000 is off by 3e-5, which centering shows: what is left corrects both moments.
    shift = tl.sum(centered, axis=0) / N
    variance = tl.sum(centered * centered, axis=0) / N - shift * shift
    rstd = tl.rsqrt(tl.where(variance < 0.0, 0.0, variance) + eps)
    return (centered - shift) * rstd, near + shift, rstd


@triton.jit
def rms_normalize(x, N, eps):
    """xhat = x * rstd, and rstd: RMSNorm."""
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / N + eps)
    return x * rstd, rstd


@triton.jit
def load_weight(weight_ptr, at, mask, ZERO_CENTERED: tl.constexpr):
    """The weight of each element; 1 where there is none."""
    weight = 1.0
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            weight += 1.0
    return weight


@triton.jit
def scale_and_shift(xhat, weight_ptr, bias_ptr, at, mask, ZERO_CENTERED: tl.constexpr):
    """y = xhat * weight + bias, either of which may be missing."""
    y = xhat * load_weight(weight_ptr, at, mask, ZERO_CENTERED)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def normalize_backward(dy, x, weight, mean, rstd, mask, N):
    """dx, and xhat = (x - mean) * rstd, by which dy becomes its share of dweight."""
    xhat = tl.where(mask, (x - mean) * rstd, 0.0)
    # dx = rstd * (g - mean(g) - xhat * mean(g * xhat)), with g = dy * weight
    g = dy * weight
    dx = rstd * (g - tl.sum(g, axis=0) / N - xhat * (tl.sum(g * xhat, axis=0) / N))
    return dx, xhat


@triton.jit
def rms_normalize_backward(dy, x, weight, rstd, N):
    """dx, and xhat = x * rstd, by which dy becomes its share of dweight."""
    xhat = x * rstd
    g = dy * weight
    return rstd * (g - xhat * (tl.sum(g * xhat, axis=0) / N)), xhat
