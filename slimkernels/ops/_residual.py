"""The sum that add_layer_norm and add_rms_norm normalise: residual + row_scale * dropout(input)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.ops._checks import check_dropout, check_flag, check_tensor, normalized_rows
from slimkernels.ops._dropout import dropped


def add_branch(
    x: Tensor, residual: Tensor, dropout_p: float, row_scale: Tensor | None, seed: Tensor | None
) -> Tensor:
    """The definition of the sum, in residual's dtype. row_scale (M,); a seed means dropout."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if seed is not None:
        wide = dropped(wide, seed, dropout_p)
    if row_scale is not None:
        wide = wide * row_scale.view(*x.shape[:-1], 1)
    return (residual + wide).to(residual.dtype)


def is_plain_sum(x: Tensor, residual: Tensor, row_scale: Tensor | None, seed: object) -> bool:
    """Whether the sum is residual + x, and so both have the same gradient."""
    return seed is None and row_scale is None and x.dtype == residual.dtype


def branch_gradients(dy: Tensor, total: Tensor, is_plain_sum: bool) -> tuple[Tensor, Tensor]:
    """Empty dx and dresidual. Of a plain sum dx has no elements: dresidual serves both inputs."""
    dx = total.new_empty(0) if is_plain_sum else torch.empty_like(total, dtype=dy.dtype)
    return dx, torch.empty_like(total)


def residual_arguments(
    op: str,
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dropout_p: float,
    row_scale: Tensor | None,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The tensors checked, the normalized dimensions flattened into one, and row_scale (M,)."""
    x, weight, bias = normalized_rows(op, input, normalized_shape, weight, bias)
    check_tensor(op, "residual", residual)
    if residual.shape != input.shape:
        raise ValueError(
            f"{op}: residual must have input's shape {tuple(input.shape)}; "
            f"got {tuple(residual.shape)}"
        )
    if residual.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"{op}: residual must be {input.dtype} like input, or float32; got {residual.dtype}"
        )
    if residual.device != input.device:
        raise ValueError(
            f"{op}: residual must be on {input.device} like input; got {residual.device}"
        )
    check_dropout(op, dropout_p)
    check_flag(op, "zero_centered", zero_centered)
    if row_scale is not None:
        row_scale = _of_rows(op, row_scale, input, x)
    return x, residual.reshape(x.shape), weight, bias, row_scale


def _of_rows(op: str, row_scale: Tensor, input: Tensor, x: Tensor) -> Tensor:
    """row_scale, one number a row of x."""
    check_tensor(op, "row_scale", row_scale)
    rows, shape = x.shape[:-1], row_scale.shape
    if len(shape) == input.dim() and all(size == 1 for size in shape[len(rows) :]):
        shape = shape[: len(rows)]
    sizes = zip(reversed(shape), reversed(rows), strict=False)
    if len(shape) > len(rows) or any(s not in (1, n) for s, n in sizes):
        raise ValueError(
            f"{op}: row_scale must broadcast to the rows {tuple(rows)} of input; "
            f"got {tuple(row_scale.shape)}"
        )
    if row_scale.dtype != torch.float32:
        raise ValueError(f"{op}: row_scale must be float32; got {row_scale.dtype}")
    if row_scale.device != input.device:
        raise ValueError(
            f"{op}: row_scale must be on {input.device} like input; got {row_scale.device}"
        )
    if row_scale.requires_grad:
        raise ValueError(
            f"{op}: row_scale must not require a gradient, which {op} does not compute"
        )
    return row_scale.reshape(shape).expand(rows).reshape(-1)
