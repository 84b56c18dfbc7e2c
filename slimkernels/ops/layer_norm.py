"""LayerNorm (Ba, Kiros, Hinton 2016): y = (x - mean) / sqrt(var + eps) * weight + bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import autocast_device, check_number, normalized_rows
from slimkernels.ops._first_order import first_order


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The definition. Statistics in float32, or in float64 if x is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalise each row of `input` to mean 0 and variance 1, then scale and shift it.

    input             (..., *normalized_shape) float32, float16, bfloat16 or float64
    normalized_shape  the trailing dimensions that make a row, as in torch
    weight, bias      normalized_shape, in input's dtype or float32; None for 1 and 0
    eps               added to the variance
    Returns           input's shape and dtype; computed in float32 (float64 for float64)
    Saves             input, weight, mean and rstd (one float32 each a row)
    Errors            ValueError naming the argument whose shape, dtype or device is wrong
    """
    x, weight, bias, _ = args = _arguments(input, normalized_shape, weight, bias, eps)
    chosen = LAYER_NORM.select(*args, backend=backend)
    if chosen == "torch":
        return layer_norm_by_torch(*args).view(input.shape)
    if needs_gradient(x, weight, bias):
        return _LayerNorm.apply(*distinct(*args), chosen).view(input.shape)
    return layer_norm_forward(*args, chosen)[0].view(input.shape)


def layer_norm_by_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The definition in torch's one fused kernel, where it is as exact and takes the dtypes."""
    if x.dtype == torch.float64 or any(
        p is not None and p.dtype != x.dtype for p in (weight, bias)
    ):
        return layer_norm_reference(x, weight, bias, eps)
    if not torch.is_autocast_enabled(autocast_device(x)):  # leaving it costs more than a small norm
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    with torch.autocast(autocast_device(x), enabled=False):  # which would return float32
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _arguments(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    rows = normalized_rows("layer_norm", input, normalized_shape, weight, bias)
    check_number("layer_norm", "eps", eps)
    return *rows, eps


# Order: triton before cuda until a table of GPU measurements says otherwise.
LAYER_NORM = Op("layer_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, backend):
        y, mean, rstd = layer_norm_forward(x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        return y

    @staticmethod
    @first_order("layer_norm")
    def backward(ctx, saved, dy):
        _, weight, bias, _, _ = saved
        dx, dweight, dbias = layer_norm_backward(dy, *saved, ctx.backend)
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, dweight, dbias, None, None


def _forward_fake(x, weight, bias, eps, backend):
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, torch.empty_like(mean)


@kernel_op("layer_norm_forward", _forward_fake)
def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return LAYER_NORM.modules[backend].forward(x, weight, bias, eps)


def _backward_fake(dy, x, weight, bias, mean, rstd, backend):
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return LAYER_NORM.modules[backend].backward(dy, x, weight, bias, mean, rstd)
