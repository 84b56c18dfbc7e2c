"""Residual connection and RMSNorm in one pass: rms_norm(residual + dropout(input))."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._dropout import draw_seed
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import ANY, chosen_before, remember
from slimkernels.ops._residual import (
    add_branch,
    branch_gradients,
    is_plain_sum,
    residual_arguments,
)
from slimkernels.ops.layer_norm import gradient_of
from slimkernels.ops.rms_norm import (
    checked_eps,
    is_mixed,
    rms_norm_by_torch,
    rms_norm_reference,
)


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    row_scale: Tensor | None,
    zero_centered: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition. The mean square is that of the sum as stored, in residual's dtype."""
    total = add_branch(x, residual, dropout_p, row_scale, seed)
    return rms_norm_reference(total, weight, eps, zero_centered).to(x.dtype), total


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    zero_centered: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = residual + row_scale * dropout(input), and rms_norm(sum), in one pass.

    input             (..., *normalized_shape) float32, float16, bfloat16 or float64
    residual          input's shape and device, in input's dtype or float32
    normalized_shape  the trailing dimensions that make a row, as in torch
    weight            normalized_shape, in input's dtype or float32; None for 1
    eps               added to the mean square; None for the epsilon that rms_norm(input) takes
    dropout_p         probability of dropping an element of input, in [0, 1); survivors are
                      multiplied by 1 / (1 - dropout_p). Pass 0 outside training.
    row_scale         float32, one number a row of input, or what broadcasts to it, as (B, 1) or
                      (B, 1, 1) does where input is (B, T, N): 0 for a branch that stochastic depth
                      skips. It gets no gradient. None for 1
    zero_centered     multiply by 1 + weight, as Gemma does
    Returns           (output, sum), of input's shape; output in input's dtype, sum in residual's;
                      output is exactly rms_norm(sum)
    Saves             sum, weight, rstd (one float32 a row), row_scale and the seed
    Errors            ValueError naming the argument whose shape, dtype or device is wrong
    """
    tensors = input, residual, weight, row_scale
    call = tensors, ("add_rms_norm", normalized_shape, eps, dropout_p, zero_centered, backend)
    chosen = chosen_before(call)
    if chosen == "torch":
        total = input + residual
        eps = checked_eps("add_rms_norm", eps, input)
        return torch.rms_norm(total, weight.shape, weight, eps), total
    if chosen is not None:
        eps = checked_eps("add_rms_norm", eps, input)
        args = input, residual, weight, eps, dropout_p, row_scale, zero_centered
    else:
        options = {"dropout_p": dropout_p, "row_scale": row_scale, "zero_centered": zero_centered}
        args = _arguments(input, residual, normalized_shape, weight, eps, **options)
        chosen = ADD_RMS_NORM.select(*args, backend=backend)
        if chosen != "torch" and args[0] is input and row_scale is None:
            remember(call, chosen, limit=ANY)
    seed = draw_seed(input.device) if dropout_p > 0 else None
    if chosen == "torch" and is_plain_sum(*args[:2], row_scale, seed):
        total = args[0] + args[1]
        y = rms_norm_by_torch(total, *args[2:4], zero_centered)
        is_whole = args[0] is input and weight is not None
        if backend is None and is_whole and not is_mixed(total, weight, zero_centered):
            remember(call)
    elif chosen == "torch":
        y, total = add_rms_norm_reference(*args, seed)
    elif needs_gradient(*args[:3]):
        y, total = _AddRMSNorm.apply(*distinct(*args), seed, chosen)
    else:
        y, total, _ = add_rms_norm_forward(*args, seed, chosen)
    return (y, total) if args[0] is input else (y.view(input.shape), total.view(input.shape))


def _arguments(
    input,
    residual,
    normalized_shape,
    weight=None,
    eps=None,
    *,
    dropout_p=0.0,
    row_scale=None,
    zero_centered=False,
):
    x, residual, weight, _, row_scale = residual_arguments(
        "add_rms_norm",
        input,
        residual,
        normalized_shape,
        weight,
        None,
        dropout_p=dropout_p,
        row_scale=row_scale,
        zero_centered=zero_centered,
    )
    eps = checked_eps("add_rms_norm", eps, x)
    return x, residual, weight, eps, dropout_p, row_scale, zero_centered


# Order: triton before cuda until a table of GPU measurements says otherwise.
ADD_RMS_NORM = Op("add_rms_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed, backend):
        y, total, rstd = add_rms_norm_forward(
            x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed, backend
        )
        ctx.save_for_backward(total, weight, rstd, row_scale, seed)
        ctx.is_plain_sum = is_plain_sum(x, residual, row_scale, seed)
        ctx.dropout_p, ctx.zero_centered, ctx.dtype = dropout_p, zero_centered, x.dtype
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        ctx.set_materialize_grads(False)  # the last block has no gradient of the sum: no zeros
        return y, total

    @staticmethod
    @first_order("add_rms_norm")
    def backward(ctx, saved, dy, dsum):
        total, weight, rstd, row_scale, seed = saved
        if dy is None:  # nobody used the output: rare, so not worth a kernel of its own
            dy = torch.zeros_like(total, dtype=ctx.dtype)
        dx, dresidual, dweight = add_rms_norm_backward(
            *(dy, dsum, total, weight, rstd),
            *(ctx.dropout_p, row_scale, ctx.zero_centered, seed, ctx.is_plain_sum, ctx.backend),
        )
        dx = dresidual if ctx.is_plain_sum else dx
        dweight = None if weight is None else dweight
        return dx, dresidual, dweight, None, None, None, None, None, None


def _forward_fake(x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed, backend):
    y, total = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, residual))
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@kernel_op("add_rms_norm_forward", _forward_fake)
def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    row_scale: Tensor | None,
    zero_centered: bool,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return ADD_RMS_NORM.modules[backend].forward(
        x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed
    )


def _backward_fake(
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
    backend,
):
    return *branch_gradients(dy, total, is_plain_sum), gradient_of(weight, total)


@kernel_op("add_rms_norm_backward", _backward_fake)
def add_rms_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dropout_p: float,
    row_scale: Tensor | None,
    zero_centered: bool,
    seed: Tensor | None,
    is_plain_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return ADD_RMS_NORM.modules[backend].backward(
        dy, dsum, total, weight, rstd, dropout_p, row_scale, zero_centered, seed, is_plain_sum
    )
