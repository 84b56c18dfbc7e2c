"""GroupNorm (Wu, He 2018): a sample's channels in groups, each to mean 0 and variance 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import (
    check_eps,
    check_integer,
    check_parameter,
    check_tensor,
    outside_autocast,
)
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import chosen_before, remember
from slimkernels.ops.layer_norm import gradient_of, layer_norm_reference


def group_norm_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The definition: LayerNorm of each group, then the scale and shift of each channel."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    groups = wide.reshape(x.shape[0], num_groups, x.shape[1:].numel() // num_groups)
    y = layer_norm_reference(groups, None, None, eps).view(x.shape)
    of_channels = (1, -1, *(1 for _ in x.shape[2:]))
    y = y if weight is None else y * weight.view(of_channels)
    y = y if bias is None else y + bias.view(of_channels)
    return y.to(x.dtype)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Normalise each group of a sample's channels, then scale and shift each channel.

    input         (N, C, *) float32, float16, bfloat16 or float64
    num_groups    a divisor of C; the groups are C / num_groups neighbouring channels
    weight, bias  (C,), in input's dtype or float32; None for 1 and 0
    eps           added to the variance
    Returns       input's shape and dtype, contiguous from a kernel; computed in float32 (float64
                  for float64); a group of one element becomes its bias
    Saves         input, weight, bias, mean and rstd (one float32 each a group)
    Errors        ValueError naming the argument whose shape, dtype or device is wrong
    """
    call = (input, weight, bias), ("group_norm", num_groups, eps, backend)
    if chosen_before(call) == "torch":
        return torch.group_norm(input, num_groups, weight, bias, eps)
    args = _arguments(input, num_groups, weight, bias, eps)
    chosen = GROUP_NORM.select(*args, backend=backend)
    if chosen == "torch":
        # The kernel refuses other layouts, which a call's key does not tell apart.
        if backend is None and input.is_contiguous() and not is_odd(*args):
            remember(call)
        return group_norm_by_torch(*args)
    if needs_gradient(input, weight, bias):
        return _GroupNorm.apply(*distinct(*args), chosen)
    return group_norm_forward(*args, chosen)[0]


def group_norm_by_torch(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The definition in torch's one fused kernel, where it is as exact and takes the dtypes."""
    if is_odd(x, num_groups, weight, bias, eps):
        return group_norm_reference(x, num_groups, weight, bias, eps)
    return outside_autocast(F.group_norm, x, num_groups, weight, bias, eps)


def is_odd(x, num_groups, weight, bias, eps) -> bool:
    """Whether torch's kernel would be wrong for the call, or less exact than the definition.

    torch has no gradient of a bias without a weight, refuses one group of one element, and of
    channels without elements makes NaN.
    """
    is_mixed = any([p is not None and p.dtype != x.dtype for p in (weight, bias)])
    is_rare = weight is None and bias is not None or x.numel() <= x.shape[0] * num_groups
    return x.dtype == torch.float64 or is_mixed or is_rare


def _arguments(input, num_groups, weight=None, bias=None, eps=1e-5):
    check_tensor("group_norm", "input", input)
    check_integer("group_norm", "num_groups", num_groups)
    shape = tuple(input.shape)
    if len(shape) < 2:
        raise ValueError(f"group_norm: input must have shape (N, C, *); got {shape}")
    if num_groups < 1 or shape[1] % num_groups or shape[1] == 0:
        raise ValueError(
            f"group_norm: num_groups must divide the {shape[1]} channels of input {shape}; "
            f"got {num_groups}"
        )
    check_parameter("group_norm", "weight", weight, input, shape[1], "the channels")
    check_parameter("group_norm", "bias", bias, input, shape[1], "the channels")
    check_eps("group_norm", eps)
    return input, num_groups, weight, bias, eps


# Order: triton before cuda until a table of GPU measurements says otherwise.
GROUP_NORM = Op("group_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_groups, weight, bias, eps, backend):
        y, mean, rstd = group_norm_forward(x, num_groups, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        return y

    @staticmethod
    @first_order("group_norm")
    def backward(ctx, saved, dy):
        _, weight, bias, _, _ = saved
        dx, dweight, dbias = group_norm_backward(dy, *saved, ctx.backend)
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return dx, None, dweight, dbias, None, None


def _forward_fake(x, num_groups, weight, bias, eps, backend):
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, mean, torch.empty_like(mean)


@kernel_op("group_norm_forward", _forward_fake)
def group_norm_forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return GROUP_NORM.modules[backend].forward(x, num_groups, weight, bias, eps)


def _backward_fake(dy, x, weight, bias, mean, rstd, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, gradient_of(weight, x), gradient_of(bias, x)


@kernel_op("group_norm_backward", _backward_fake)
def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return GROUP_NORM.modules[backend].backward(dy, x, weight, bias, mean, rstd)
