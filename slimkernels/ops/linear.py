"""The affine map of a linear layer: y = x @ weight^T + bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import check_tensor
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import is_torchs_own, remember


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition, which is torch's own; it follows autocast."""
    return F.linear(x, weight, bias)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """input @ weight^T + bias: torch's product, or on the CPU oneDNN's where that is faster.

    input    (..., K) float32, float16, bfloat16 or float64
    weight   (N, K), bias (N,): the same dtype, except under autocast, which converts all three
    Returns  (..., N), input's dtype, or autocast's
    Saves    input and weight
    Errors   ValueError naming the argument whose shape, dtype or device is wrong
    """
    call = (input, weight, bias), ("linear", backend)
    if is_torchs_own(call):
        return F.linear(input, weight, bias)
    args = _arguments(input, weight, bias)
    chosen = LINEAR.select(*args, backend=backend)
    if chosen == "torch":
        if backend is None:
            remember(call)
        return linear_reference(*args)
    if needs_gradient(*args):
        return _Linear.apply(*distinct(*args), chosen)
    return linear_forward(*args, chosen)


def _arguments(input, weight, bias=None):
    check_tensor("linear", "input", input)
    check_tensor("linear", "weight", weight)
    if input.dim() == 0:
        raise ValueError("linear: input must have a last dimension; got shape ()")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear: weight must have shape (N, {input.shape[-1]}), the last dimension of input "
            f"{tuple(input.shape)}; got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("linear", "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"linear: bias must have shape {tuple(weight.shape[:1])}, the rows of weight "
                f"{tuple(weight.shape)}; got {tuple(bias.shape)}"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.device != input.device:
            raise ValueError(
                f"linear: {name} must be on {input.device} like input; got {parameter.device}"
            )
        if parameter.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(
                f"linear: {name} must be {input.dtype} like input; got {parameter.dtype}"
            )
    return input, weight, bias


_NO_KERNEL = "torch's own matrix product is the fastest known"
# Order: oneDNN where backends/cpu/linear.py has measured it faster; nothing to add on a GPU.
LINEAR = Op(
    "linear",
    order=("cpu",),
    arguments=_arguments,
    is_bonus=True,
    modules={"triton": _NO_KERNEL, "cuda": _NO_KERNEL},
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return linear_forward(x, weight, bias, backend)

    @staticmethod
    @first_order("linear")
    def backward(ctx, saved, dy):
        wanted = list(ctx.needs_input_grad[:3])
        gradients = linear_backward(dy, *saved, wanted, ctx.backend)
        return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None


def _forward_fake(x, weight, bias, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@kernel_op("linear_forward", _forward_fake)
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return LINEAR.modules[backend].forward(x, weight, bias)


def _backward_fake(dy, x, weight, wanted, backend):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(s if w else 0) for s, w in zip(shapes, wanted, strict=True))


@kernel_op("linear_backward", _backward_fake)
def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor for each that is not wanted.

    A product that nothing needs (a frozen weight, the first layer's input) is half of backward.
    """
    return LINEAR.modules[backend].backward(dy, x, weight, wanted)
