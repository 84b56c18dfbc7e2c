"""LayerNorm (Ba, Kiros, Hinton 2016): y = (x - mean) / sqrt(var + eps) * weight + bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import check_eps, check_flag, normalized_rows, outside_autocast
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import is_torchs_own, remember


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """The definition. Statistics in float32, or in float64 if x is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * full_weight(weight, y, zero_centered)
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def full_weight(weight: Tensor, y: Tensor, zero_centered: bool) -> Tensor:
    """What y is multiplied by: the weight, or 1 + weight, which its own dtype could not hold."""
    return weight.to(torch.promote_types(weight.dtype, y.dtype)) + 1 if zero_centered else weight


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Normalise each row of `input` to mean 0 and variance 1, then scale and shift it.

    input             (..., *normalized_shape) float32, float16, bfloat16 or float64
    normalized_shape  the trailing dimensions that make a row, as in torch
    weight, bias      normalized_shape, in input's dtype or float32; None for 1 and 0
    eps               added to the variance
    zero_centered     multiply by 1 + weight, whose weight decay pulls towards 1
    Returns           input's shape and dtype; computed in float32 (float64 for float64)
    Saves             input, weight, bias, mean and rstd (one float32 each a row)
    Errors            ValueError naming the argument whose shape, dtype or device is wrong
    """
    call = (input, weight, bias), ("layer_norm", normalized_shape, eps, zero_centered, backend)
    if is_torchs_own(call):
        return torch.layer_norm(input, weight.shape, weight, bias, eps)
    args = _arguments(input, normalized_shape, weight, bias, eps, zero_centered=zero_centered)
    chosen = LAYER_NORM.select(*args, backend=backend)
    if chosen == "torch":
        y = layer_norm_by_torch(*args)
        if backend is None and weight is not None and not is_odd(*args):
            remember(call)
    elif needs_gradient(*args[:3]):
        y = _LayerNorm.apply(*distinct(*args), chosen)
    else:
        y = layer_norm_forward(*args, chosen)[0]
    return y if args[0] is input else y.view(input.shape)


def layer_norm_by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: bool
) -> Tensor:
    """The definition in torch's one fused kernel, where it is as exact and takes the dtypes."""
    if zero_centered and weight is not None and weight.dtype == torch.float32:
        weight, zero_centered = weight + 1, False
    if is_odd(x, weight, bias, eps, zero_centered):
        return layer_norm_reference(x, weight, bias, eps, zero_centered)
    return outside_autocast(torch.layer_norm, x, x.shape[-1:], weight, bias, eps)


def is_odd(x, weight, bias, eps, zero_centered) -> bool:
    """Whether torch's kernel would be wrong for the call, or less exact than the definition."""
    return x.dtype == torch.float64 or any(
        [p is not None and (p.dtype != x.dtype or zero_centered) for p in (weight, bias)]
    )


def _arguments(input, normalized_shape, weight=None, bias=None, eps=1e-5, *, zero_centered=False):
    rows = normalized_rows("layer_norm", input, normalized_shape, weight, bias)
    check_eps("layer_norm", eps)
    check_flag("layer_norm", "zero_centered", zero_centered)
    return *rows, eps, zero_centered


# Order: triton before cuda until a table of GPU measurements says otherwise.
LAYER_NORM = Op("layer_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, zero_centered, backend):
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps, zero_centered, backend)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.zero_centered = zero_centered
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        return y

    @staticmethod
    @first_order("layer_norm")
    def backward(ctx, saved, dy):
        _, weight, bias, _, _ = saved
        dx, dweight, dbias = layer_norm_backward(dy, *saved, ctx.zero_centered, ctx.backend)
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, dweight, dbias, None, None, None


def _forward_fake(x, weight, bias, eps, zero_centered, backend):
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, torch.empty_like(mean)


@kernel_op("layer_norm_forward", _forward_fake)
def layer_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    zero_centered: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return LAYER_NORM.modules[backend].forward(x, weight, bias, eps, zero_centered)


def _backward_fake(dy, x, weight, bias, mean, rstd, zero_centered, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, gradient_of(weight, x), gradient_of(bias, x)


# A registered op returns tensors, so the gradient of a parameter that was not given is empty.
def gradient_of(parameter: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if parameter is None else torch.empty_like(parameter)


@kernel_op("layer_norm_backward", _backward_fake)
def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    zero_centered: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    module = LAYER_NORM.modules[backend]
    return module.backward(dy, x, weight, bias, mean, rstd, zero_centered)
