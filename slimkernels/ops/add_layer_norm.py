"""Residual connection and LayerNorm in one pass: layer_norm(residual + dropout(input)).

Post-norm blocks (Vaswani et al. 2017) go on with the output alone; pre-norm blocks (Xiong et al.
2020) go on with the output and carry the sum to the next residual connection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import check_alike, check_dropout, check_number, normalized_rows
from slimkernels.ops._dropout import draw_seed, keep_mask
from slimkernels.ops._first_order import first_order
from slimkernels.ops.layer_norm import gradient_of, layer_norm_by_torch, layer_norm_reference


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition. The statistics are those of the sum as stored, in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if seed is not None:
        N = x.shape[-1]
        rows = torch.arange(x.numel() // N, device=x.device).view(*x.shape[:-1], 1)
        keep = keep_mask(seed, rows, torch.arange(N, device=x.device), dropout_p)
        wide = torch.where(keep, wide * (1 / (1 - dropout_p)), 0.0)
    total = (residual + wide).to(x.dtype)
    return layer_norm_reference(total, weight, bias, eps), total


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = residual + dropout(input), and layer_norm(sum): both, without storing the dropout.

    input             (..., *normalized_shape) float32, float16, bfloat16 or float64
    residual          input's shape, dtype and device
    normalized_shape  the trailing dimensions that make a row, as in torch
    weight, bias      normalized_shape, in input's dtype or float32; None for 1 and 0
    eps               added to the variance
    dropout_p         probability of dropping an element of input, in [0, 1); survivors are
                      multiplied by 1 / (1 - dropout_p). Pass 0 outside training.
    Returns           (output, sum), input's shape and dtype; output is exactly layer_norm(sum)
    Saves             sum, weight, mean and rstd (one float32 each a row) and the seed
    Errors            ValueError naming the argument whose shape, dtype or device is wrong
    """
    args = _arguments(input, residual, normalized_shape, weight, bias, eps, dropout_p=dropout_p)
    chosen = ADD_LAYER_NORM.select(*args, backend=backend)
    seed = draw_seed(input.device) if dropout_p > 0 else None
    if chosen == "torch" and seed is None:
        total = args[0] + args[1]
        y = layer_norm_by_torch(total, *args[2:5])
    elif chosen == "torch":
        y, total = add_layer_norm_reference(*args, seed)
    elif needs_gradient(*args[:4]):
        y, total = _AddLayerNorm.apply(*distinct(*args), seed, chosen)
    else:
        y, total, _, _ = add_layer_norm_forward(*args, seed, chosen)
    return y.view(input.shape), total.view(input.shape)


def _arguments(
    input, residual, normalized_shape, weight=None, bias=None, eps=1e-5, *, dropout_p=0.0
):
    rows = normalized_rows("add_layer_norm", input, normalized_shape, weight, bias)
    x, weight, bias = rows
    check_alike("add_layer_norm", "residual", residual, input)
    check_number("add_layer_norm", "eps", eps)
    check_dropout("add_layer_norm", dropout_p)
    return x, residual.reshape(x.shape), weight, bias, eps, dropout_p


# Order: triton before cuda until a table of GPU measurements says otherwise.
ADD_LAYER_NORM = Op("add_layer_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed, backend):
        y, total, mean, rstd = add_layer_norm_forward(
            x, residual, weight, bias, eps, dropout_p, seed, backend
        )
        ctx.save_for_backward(total, weight, bias, mean, rstd, seed)
        ctx.dropout_p = dropout_p
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        ctx.set_materialize_grads(False)  # post-norm has no gradient of the sum: no zeros for it
        return y, total

    @staticmethod
    @first_order("add_layer_norm")
    def backward(ctx, saved, dy, dsum):
        total, weight, bias, mean, rstd, seed = saved
        if dy is None:  # nobody used the output: rare, so not worth a kernel of its own
            dy = torch.zeros_like(total)
        dx, dresidual, dweight, dbias = add_layer_norm_backward(
            dy, dsum, total, weight, bias, mean, rstd, ctx.dropout_p, seed, ctx.backend
        )
        dx = dresidual if seed is None else dx
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, dresidual, dweight, dbias, None, None, None, None


def _forward_fake(x, residual, weight, bias, eps, dropout_p, seed, backend):
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return y, total, mean, torch.empty_like(mean)


@kernel_op("add_layer_norm_forward", _forward_fake)
def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ADD_LAYER_NORM.modules[backend].forward(x, residual, weight, bias, eps, dropout_p, seed)


def _backward_fake(dy, dsum, total, weight, bias, mean, rstd, dropout_p, seed, backend):
    # Without dropout dx is dresidual, which autograd gives to both; the op's own is then empty.
    dx = total.new_empty(0) if seed is None else torch.empty_like(total)
    dresidual = torch.empty_like(total)
    return dx, dresidual, gradient_of(weight, total), gradient_of(bias, total)


@kernel_op("add_layer_norm_backward", _backward_fake)
def add_layer_norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ADD_LAYER_NORM.modules[backend].backward(
        dy, dsum, total, weight, bias, mean, rstd, dropout_p, seed
    )
