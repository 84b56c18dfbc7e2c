"""Residual connection and LayerNorm in one pass: layer_norm(residual + dropout(input)).

Post-norm blocks (Vaswani et al. 2017) go on with the output alone; pre-norm blocks (Xiong et al.
2020) go on with the output and carry the sum to the next residual connection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, may_skip_dispatcher, needs_gradient
from slimkernels.ops._checks import check_eps
from slimkernels.ops._dropout import draw_seed
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import ANY, chosen_before, remember
from slimkernels.ops._residual import (
    add_branch,
    branch_gradients,
    is_plain_sum,
    residual_arguments,
)
from slimkernels.ops.layer_norm import (
    gradient_of,
    is_odd,
    layer_norm_by_torch,
    layer_norm_reference,
)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    row_scale: Tensor | None,
    zero_centered: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition. The statistics are those of the sum as stored, in residual's dtype."""
    total = add_branch(x, residual, dropout_p, row_scale, seed)
    return layer_norm_reference(total, weight, bias, eps, zero_centered).to(x.dtype), total


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    row_scale: Tensor | None = None,
    zero_centered: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = residual + row_scale * dropout(input), and layer_norm(sum), in one pass.

    input             (..., *normalized_shape) float32, float16, bfloat16 or float64
    residual          input's shape and device, in input's dtype or float32
    normalized_shape  the trailing dimensions that make a row, as in torch
    weight, bias      normalized_shape, in input's dtype or float32; None for 1 and 0
    eps               added to the variance
    dropout_p         probability of dropping an element of input, in [0, 1); survivors are
                      multiplied by 1 / (1 - dropout_p). Pass 0 outside training.
    row_scale         float32, one number a row of input, or what broadcasts to it, as (B, 1) or
                      (B, 1, 1) does where input is (B, T, N): 0 for a branch that stochastic depth
                      skips. It gets no gradient. None for 1
    zero_centered     multiply by 1 + weight
    Returns           (output, sum), of input's shape; output in input's dtype, sum in residual's;
                      output is exactly layer_norm(sum)
    Saves             sum, weight, bias, mean and rstd (one float32 each a row), row_scale, the seed
    Errors            ValueError naming the argument whose shape, dtype or device is wrong
    """
    tensors = input, residual, weight, bias, row_scale
    call = tensors, ("add_layer_norm", normalized_shape, eps, dropout_p, zero_centered, backend)
    chosen = chosen_before(call)
    if chosen == "torch":
        total = input + residual
        return torch.layer_norm(total, weight.shape, weight, bias, eps), total
    if chosen is not None:
        args = input, residual, weight, bias, eps, dropout_p, row_scale, zero_centered
    else:
        options = {"dropout_p": dropout_p, "row_scale": row_scale, "zero_centered": zero_centered}
        args = _arguments(input, residual, normalized_shape, weight, bias, eps, **options)
        chosen = ADD_LAYER_NORM.select(*args, backend=backend)
        if chosen != "torch" and args[0] is input and row_scale is None:
            remember(call, chosen, limit=ANY)
    seed = draw_seed(input.device) if dropout_p > 0 else None
    if chosen == "torch" and is_plain_sum(*args[:2], row_scale, seed):
        total = args[0] + args[1]
        y = layer_norm_by_torch(total, *args[2:5], zero_centered)
        if backend is None and weight is not None and not is_odd(total, *args[2:5], zero_centered):
            remember(call)
    elif chosen == "torch":
        y, total = add_layer_norm_reference(*args, seed)
    elif needs_gradient(*args[:4]):
        y, total = _AddLayerNorm.apply(*distinct(*args), seed, chosen)
    else:
        y, total, _, _ = add_layer_norm_forward(*args, seed, chosen)
    return (y, total) if args[0] is input else (y.view(input.shape), total.view(input.shape))


def post_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dropout_p: float,
) -> Tensor:
    """layer_norm(residual + dropout(x)) without the sum, with which post-norm blocks do not go on.

    On the CPU, where no gradient wants it, the sum is then not stored.
    """
    tensors = x, residual, weight, bias
    options = "add_layer_norm", normalized_shape, eps, dropout_p, False, None
    if dropout_p == 0 and chosen_before(((*tensors, None), options)) == "cpu":
        is_plain = is_plain_sum(x, residual, None, None) and may_skip_dispatcher(tensors)
        if is_plain and not needs_gradient(*tensors):
            return ADD_LAYER_NORM.modules["cpu"].forward_alone(*tensors, eps)
    norm = normalized_shape, weight, bias, eps
    return add_layer_norm(x, residual, *norm, dropout_p=dropout_p)[0]


def _arguments(
    input,
    residual,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    dropout_p=0.0,
    row_scale=None,
    zero_centered=False,
):
    *tensors, row_scale = residual_arguments(
        "add_layer_norm",
        input,
        residual,
        normalized_shape,
        weight,
        bias,
        dropout_p=dropout_p,
        row_scale=row_scale,
        zero_centered=zero_centered,
    )
    check_eps("add_layer_norm", eps)
    return *tensors, eps, dropout_p, row_scale, zero_centered


# Order: triton before cuda until a table of GPU measurements says otherwise.
ADD_LAYER_NORM = Op("add_layer_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed, backend
    ):
        y, total, mean, rstd = add_layer_norm_forward(
            x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed, backend
        )
        ctx.save_for_backward(total, weight, bias, mean, rstd, row_scale, seed)
        ctx.is_plain_sum = is_plain_sum(x, residual, row_scale, seed)
        ctx.dropout_p, ctx.zero_centered, ctx.dtype = dropout_p, zero_centered, x.dtype
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        ctx.set_materialize_grads(False)  # post-norm has no gradient of the sum: no zeros for it
        return y, total

    @staticmethod
    @first_order("add_layer_norm")
    def backward(ctx, saved, dy, dsum):
        total, weight, bias, mean, rstd, row_scale, seed = saved
        if dy is None:  # nobody used the output: rare, so not worth a kernel of its own
            dy = torch.zeros_like(total, dtype=ctx.dtype)
        dx, dresidual, dweight, dbias = add_layer_norm_backward(
            *(dy, dsum, total, weight, bias, mean, rstd),
            *(ctx.dropout_p, row_scale, ctx.zero_centered, seed, ctx.is_plain_sum, ctx.backend),
        )
        dx = dresidual if ctx.is_plain_sum else dx
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, dresidual, dweight, dbias, None, None, None, None, None, None


def _forward_fake(
    x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed, backend
):
    y, total = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, residual))
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
    row_scale: Tensor | None,
    zero_centered: bool,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ADD_LAYER_NORM.modules[backend].forward(
        x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed
    )


def _backward_fake(
    dy,
    dsum,
    total,
    weight,
    bias,
    mean,
    rstd,
    dropout_p,
    row_scale,
    zero_centered,
    seed,
    is_plain_sum,
    backend,
):
    dx, dresidual = branch_gradients(dy, total, is_plain_sum)
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
    row_scale: Tensor | None,
    zero_centered: bool,
    seed: Tensor | None,
    is_plain_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = ADD_LAYER_NORM.modules[backend]
    return module.backward(
        *(dy, dsum, total, weight, bias, mean, rstd, dropout_p, row_scale, zero_centered, seed),
        is_plain_sum,
    )
