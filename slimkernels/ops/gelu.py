"""GELU (Hendrycks, Gimpel 2016): y = z * Phi(z) with z = x + bias, exact or by tanh."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import check_parameter, check_tensor
from slimkernels.ops._first_order import first_order
from slimkernels.ops.layer_norm import gradient_of

APPROXIMATIONS = ("none", "tanh")


def gelu_reference(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """The definition, in float32, or in float64 if x is."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    z = z if bias is None else z + bias
    if approximate == "tanh":
        y = z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z.pow(3)))
    else:
        # Not 1 + erf, which is 0 in float32 from z = -5.6 on.
        y = z * (0.5 * torch.erfc(-math.sqrt(0.5) * z))
    return y.to(x.dtype)


def gelu(
    input: Tensor,
    *,
    approximate: str = "none",
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """z * Phi(z) with z = input + bias, Phi being the normal distribution function.

    input        any shape, float32, float16, bfloat16 or float64
    approximate  "none" for Phi itself; "tanh" for (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2
    bias         (N,), input's last dimension, in input's dtype or float32: a linear layer's bias
                 added here costs no pass over memory of its own
    Returns      input's shape and dtype; computed in float32 (float64 for float64). The kernels
                 keep their relative accuracy for negative z, where torch's 1 + erf loses it.
    Saves        input and bias
    Errors       ValueError naming the argument whose value, shape, dtype or device is wrong
    """
    x, bias, approximate = args = _arguments(input, approximate=approximate, bias=bias)
    chosen = GELU.select(*args, backend=backend)
    if chosen == "torch":
        # The definition in torch's one fused kernel, which is what eager code would call.
        z = x if bias is None else x.to(torch.promote_types(x.dtype, torch.float32)) + bias
        return F.gelu(z, approximate=approximate).to(x.dtype)
    if needs_gradient(x, bias):
        return _GELU.apply(*distinct(*args), chosen)
    return gelu_forward(*args, chosen)


def _arguments(input, *, approximate="none", bias=None):
    check_tensor("gelu", "input", input)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"gelu: approximate must be 'none' or 'tanh'; got {approximate!r}")
    if isinstance(bias, Tensor) and (input.dim() == 0 or bias.shape != input.shape[-1:]):
        raise ValueError(
            f"gelu: bias must have shape {tuple(input.shape[-1:])}, the last dimension of input "
            f"{tuple(input.shape)}; got {tuple(bias.shape)}"
        )
    check_parameter("gelu", "bias", bias, input, input.shape[-1] if input.dim() else 1)
    return input, bias, approximate


# Order: triton before cuda until a table of GPU measurements says otherwise.
GELU = Op("gelu", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, approximate, backend):
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        ctx.backend = backend
        return gelu_forward(x, bias, approximate, backend)

    @staticmethod
    @first_order("gelu")
    def backward(ctx, saved, dy):
        x, bias = saved
        dx, dbias = gelu_backward(dy, x, bias, ctx.approximate, ctx.backend)
        return dx, None if bias is None else dbias, None, None


def _forward_fake(x, bias, approximate, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("gelu_forward", _forward_fake)
def gelu_forward(x: Tensor, bias: Tensor | None, approximate: str, backend: str) -> Tensor:
    return GELU.modules[backend].forward(x, bias, approximate)


def _backward_fake(dy, x, bias, approximate, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, gradient_of(bias, x)


@kernel_op("gelu_backward", _backward_fake)
def gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, backend: str
) -> tuple[Tensor, Tensor]:
    return GELU.modules[backend].backward(dy, x, bias, approximate)
