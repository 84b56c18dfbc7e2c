"""The call of csrc/cuda/norm_forward.cuh and norm_backward.cuh that all norms share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimkernels.backends._dropout import threshold
from slimkernels.backends.cuda._common import (
    _cuda,
    dense,
    dtype_number,
    launch_place,
    pointers,
    unsupported_row,
    unsupported_tensor,
)


def unsupported_norm(x: Tensor) -> str | None:
    return unsupported_row(x) or unsupported_tensor(x)


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """Below which bits an element is dropped, and what survivors are multiplied by."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


def forward(
    kernel: Callable[..., None],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    zero_centered: bool,
    *,
    has_mean: bool = True,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """y, total (None without a residual), mean (None if it has none) and rstd."""
    x, residual, weight, bias, row_scale = map(dense, (x, residual, weight, bias, row_scale))
    N = x.shape[-1]
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(residual)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if has_mean else None
    if x.numel():
        kernel(
            *pointers(x, residual, weight, bias, y, total, mean, rstd, seed, row_scale),
            *(x.numel() // N, N, eps, float(zero_centered), *dropout_numbers(dropout_p)),
            *map(dtype_number, (x, residual, weight, bias)),
            *launch_place(x),
        )
    return y, total, mean, rstd


def backward(
    kernel: Callable[..., None],
    dy: Tensor,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    zero_centered: bool,
    *,
    dsum: Tensor | None = None,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    seed: Tensor | None = None,
    is_plain_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, which has no elements where it is dresidual, dresidual, dweight and dbias."""
    dy, total, weight, dsum, row_scale = map(dense, (dy, total, weight, dsum, row_scale))
    N = total.shape[-1]
    M = total.numel() // N
    dresidual = torch.empty_like(total)
    dx = total.new_empty(0) if is_plain_sum else torch.empty_like(dy)
    dweight, dbias = (total.new_empty(0) if p is None else p.new_empty(N) for p in (weight, bias))
    place = launch_place(total)
    programs = _cuda.norm_programs(M, N, dtype_number(dy), place[0])
    parameters = (weight is not None) + (bias is not None)
    partials = total.new_empty(parameters, programs, N, dtype=torch.float32)
    kernel(
        *pointers(dy, dsum, total, weight, mean, rstd, dx, dresidual, dweight, dbias, partials),
        *(programs, *pointers(seed, row_scale), M, N, float(zero_centered)),
        *(*dropout_numbers(dropout_p), *map(dtype_number, (dy, total, weight, bias)), *place),
    )
    return dx, dresidual, dweight, dbias
