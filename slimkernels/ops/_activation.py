"""y = f(x + bias), element by element: what gelu, silu and relu_squared share.

f is one of a few curves, known by name in every layer; the gated units of _gated.py use the same.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import OPS, Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import check_parameter, check_tensor
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import ANY, chosen_before, remember
from slimkernels.ops.layer_norm import gradient_of


def _gelu(z: Tensor) -> Tensor:
    # Not 1 + erf, which is 0 in float32 from z = -5.6 on.
    return z * (0.5 * torch.erfc(-math.sqrt(0.5) * z))


def _gelu_tanh(z: Tensor) -> Tensor:
    return z * torch.sigmoid(math.sqrt(8 / math.pi) * (z + 0.044715 * z.pow(3)))


def _silu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z)


def _relu_squared(z: Tensor) -> Tensor:
    return F.relu(z).square()


# The definition of each curve, and what eager code would call.
DEFINITIONS = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "relu_squared": _relu_squared,
}
EAGER = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu_squared": _relu_squared,
}
# The curve of each value of gelu's and geglu's argument.
GELU_CURVES = {"none": "gelu", "tanh": "gelu_tanh"}
_OP_OF = {"gelu": "gelu", "gelu_tanh": "gelu", "silu": "silu", "relu_squared": "relu_squared"}


def activation_reference(x: Tensor, bias: Tensor | None, curve: str) -> Tensor:
    """The definition, in float32, or in float64 if x is."""
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    return DEFINITIONS[curve](z if bias is None else z + bias).to(x.dtype)


def gelu_curve(op: str, approximate: object) -> str:
    if not isinstance(approximate, str) or approximate not in GELU_CURVES:
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh'; got {approximate!r}")
    return GELU_CURVES[approximate]


def check_bias(op: str, bias: object, input: Tensor) -> None:
    """`bias` is None or a vector as long as input's last dimension."""
    if bias is None:
        return
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have a dimension for bias to lie along; got shape ()")
    if isinstance(bias, Tensor) and bias.shape != input.shape[-1:]:
        raise ValueError(
            f"{op}: bias must have shape {tuple(input.shape[-1:])}, the last dimension of input "
            f"{tuple(input.shape)}; got {tuple(bias.shape)}"
        )
    check_parameter(op, "bias", bias, input, input.shape[-1])


def activation_arguments(op: str, input: object, bias: object, curve: str) -> tuple:
    check_tensor(op, "input", input)
    check_bias(op, bias, input)
    return input, bias, curve


def activate(
    op: Op,
    function: type[torch.autograd.Function],
    x: Tensor,
    bias: Tensor | None,
    curve: str,
    backend: str | None,
) -> Tensor:
    """The public call of `op`, whose gradients are `function`'s."""
    args = x, bias, curve
    call = (x, bias), (op.name, curve, backend)
    chosen = chosen_before(call)
    if chosen is None:
        activation_arguments(op.name, *args)
        chosen = op.select(*args, backend=backend)
        remember(call, chosen, limit=ANY)
    if chosen == "torch":
        # The definition in torch's own kernels, which are what eager code would call.
        z = x if bias is None else x.to(torch.promote_types(x.dtype, torch.float32)) + bias
        y = EAGER[curve](z)
        return y if y.dtype == x.dtype else y.to(x.dtype)
    if needs_gradient(x, bias):
        return function.apply(*distinct(*args), chosen)
    return activation_forward(*args, chosen)


class Activation(torch.autograd.Function):
    """Subclassed by each op, whose name its errors bear."""

    @staticmethod
    def forward(ctx, x, bias, curve, backend):
        ctx.save_for_backward(x, bias)
        ctx.curve = curve
        ctx.backend = backend
        return activation_forward(x, bias, curve, backend)

    @staticmethod
    def gradients(ctx, saved, dy):
        x, bias = saved
        dx, dbias = activation_backward(dy, x, bias, ctx.curve, ctx.backend)
        return dx, None if bias is None else dbias, None, None


class GELU(Activation):
    backward = staticmethod(first_order("gelu")(Activation.gradients))


class SiLU(Activation):
    backward = staticmethod(first_order("silu")(Activation.gradients))


class ReLUSquared(Activation):
    backward = staticmethod(first_order("relu_squared")(Activation.gradients))


def _forward_fake(x, bias, curve, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("activation_forward", _forward_fake)
def activation_forward(x: Tensor, bias: Tensor | None, curve: str, backend: str) -> Tensor:
    return OPS[_OP_OF[curve]].modules[backend].forward(x, bias, curve)


def _backward_fake(dy, x, bias, curve, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, gradient_of(bias, x)


@kernel_op("activation_backward", _backward_fake)
def activation_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, curve: str, backend: str
) -> tuple[Tensor, Tensor]:
    return OPS[_OP_OF[curve]].modules[backend].backward(dy, x, bias, curve)
