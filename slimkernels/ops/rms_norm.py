"""RMSNorm (Zhang, Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import check_eps, check_flag, normalized_rows, outside_autocast
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import ANY, chosen_before, remember
from slimkernels.ops.layer_norm import full_weight, gradient_of


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """The definition. The mean square is in float32, or in float64 if x is."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * full_weight(weight, y, zero_centered)
    return y.to(x.dtype)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Divide each row of `input` by the root of its mean square, then scale it.

    input             (..., *normalized_shape) float32, float16, bfloat16 or float64
    normalized_shape  the trailing dimensions that make a row, as in torch
    weight            normalized_shape, in input's dtype or float32; None for 1
    eps               added to the mean square; None, as in torch, for the machine epsilon of the
                      dtype that it computes in: 2^-23, or 2^-52 for float64
    zero_centered     multiply by 1 + weight, as Gemma does
    Returns           input's shape and dtype; computed in float32 (float64 for float64), and
                      rounded once, after the weight
    Saves             input, weight and rstd (one float32 a row)
    Errors            ValueError naming the argument whose shape, dtype or device is wrong
    """
    call = (input, weight), ("rms_norm", normalized_shape, eps, zero_centered, backend)
    chosen = chosen_before(call)
    if chosen == "torch":
        return torch.rms_norm(input, weight.shape, weight, checked_eps("rms_norm", eps, input))
    if chosen is not None:
        args = input, weight, checked_eps("rms_norm", eps, input), zero_centered
    else:
        args = _arguments(input, normalized_shape, weight, eps, zero_centered=zero_centered)
        chosen = RMS_NORM.select(*args, backend=backend)
        if chosen != "torch" and args[0] is input:
            remember(call, chosen, limit=ANY)
    if chosen == "torch":
        y = rms_norm_by_torch(*args)
        is_whole = args[0] is input and weight is not None
        if backend is None and is_whole and not is_mixed(input, weight, zero_centered):
            remember(call)
    elif needs_gradient(*args[:2]):
        y = _RMSNorm.apply(*distinct(*args), chosen)
    else:
        y = rms_norm_forward(*args, chosen)[0]
    return y if args[0] is input else y.view(input.shape)


def rms_norm_by_torch(x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """The definition in torch's one function, where it is as exact and takes the dtypes."""
    if is_mixed(x, weight, zero_centered):
        return rms_norm_reference(x, weight, eps, zero_centered)
    return outside_autocast(F.rms_norm, x, x.shape[-1:], weight, eps)


def is_mixed(x: Tensor, weight: Tensor | None, zero_centered: bool) -> bool:
    """Whether torch's function would refuse the call, or be less exact than the definition."""
    return x.dtype == torch.float64 or (
        weight is not None and (weight.dtype != x.dtype or zero_centered)
    )


def _arguments(input, normalized_shape, weight=None, eps=None, *, zero_centered=False):
    x, weight, _ = normalized_rows("rms_norm", input, normalized_shape, weight, None)
    eps = checked_eps("rms_norm", eps, x)
    check_flag("rms_norm", "zero_centered", zero_centered)
    return x, weight, eps, zero_centered


def checked_eps(op: str, eps: float | None, x: Tensor) -> float:
    """eps, or torch's default for it."""
    if eps is None:
        return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    check_eps(op, eps)
    return eps


# Order: triton before cuda until a table of GPU measurements says otherwise.
RMS_NORM = Op("rms_norm", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, zero_centered, backend):
        y, rstd = rms_norm_forward(x, weight, eps, zero_centered, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        ctx.backend = backend  # backward never selects: the two must agree on what was saved
        return y

    @staticmethod
    @first_order("rms_norm")
    def backward(ctx, saved, dy):
        dx, dweight = rms_norm_backward(dy, *saved, ctx.zero_centered, ctx.backend)
        dweight = None if saved[1] is None else dweight
        return dx, dweight, None, None, None


def _forward_fake(x, weight, eps, zero_centered, backend):
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), rstd


@kernel_op("rms_norm_forward", _forward_fake)
def rms_norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return RMS_NORM.modules[backend].forward(x, weight, eps, zero_centered)


def _backward_fake(dy, x, weight, rstd, zero_centered, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, gradient_of(weight, x)


@kernel_op("rms_norm_backward", _backward_fake)
def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, zero_centered: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return RMS_NORM.modules[backend].backward(dy, x, weight, rstd, zero_centered)
