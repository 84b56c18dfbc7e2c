"""The logarithm of softmax: log_softmax(input * scale + mask), on softmax's own kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels.dispatch import Op, kernel_op, needs_gradient
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import is_torchs_own, remember
from slimkernels.ops._softmax import converted, scores_of, softmax_arguments
from slimkernels.ops.softmax import gradients_of


def log_softmax_reference(
    x: Tensor,
    dim: int = -1,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """The definition, over dim -1 or -2. A row with nothing to take part is -inf."""
    scores, nothing = scores_of(x, dim, scale, mask, is_causal)
    y = torch.log_softmax(scores, dim)
    if nothing is not None:
        # Of what is -inf only the gradient is at stake: what is hidden has none.
        y = y.masked_fill((y == -math.inf) | nothing, -math.inf)
    return y.to(x.dtype)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """log(softmax(input * scale + mask)) over `dim`, without the exp and log in between.

    input, dim, dtype, scale, mask, is_causal
               as in softmax
    Returns    input's shape and dtype, or `dtype`, without gaps; computed in float32 (float64 for
               float64). Hidden elements are -inf and have zero gradient; so is, and has, a whole
               row where nothing takes part. A row whose elements are all -inf is NaN, as in
               torch.log_softmax.
    Saves      the output. Under a mask or is_causal, gradients take what is -inf for hidden.
    Errors     ValueError naming the argument whose shape, dtype or device is wrong
    """
    call = (input, mask), ("log_softmax", dim, dtype, scale, is_causal, backend)
    if is_torchs_own(call):
        return torch.log_softmax(input, dim)
    x, *_ = args = _arguments(input, dim, dtype=dtype, scale=scale, mask=mask, is_causal=is_causal)
    chosen = LOG_SOFTMAX.select(*args, backend=backend)
    if chosen == "torch":
        y = _by_torch(*args)
        if backend is dtype is mask is None and scale == 1 and not is_causal:
            remember(call)
    elif needs_gradient(x, mask):
        y = _LogSoftmax.apply(*args, chosen)
    else:
        y = log_softmax_forward(*args, chosen)
    return y if x is input else y.view(input.shape)


def _by_torch(x, dim, scale, mask, is_causal):
    """The definition, in torch's one kernel where that is all of it."""
    if scale != 1 or mask is not None or is_causal:
        return log_softmax_reference(x, dim, scale, mask, is_causal)
    y = torch.log_softmax(x, dim)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast returns float32


def _arguments(input, dim=-1, *, dtype=None, scale=1.0, mask=None, is_causal=False):
    input, mask = converted("log_softmax", dtype, input, mask)
    return softmax_arguments("log_softmax", input, dim, scale=scale, mask=mask, is_causal=is_causal)


LOG_SOFTMAX = Op("log_softmax", order=("triton", "cpu"), arguments=_arguments)


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, scale, mask, is_causal, backend):
        y = log_softmax_forward(x, dim, scale, mask, is_causal, backend)
        ctx.save_for_backward(y)
        ctx.dim, ctx.scale = dim, scale
        ctx.hides = is_causal or mask is not None
        ctx.mask_dtype = None if mask is None else mask.dtype
        ctx.backend = backend  # backward never selects
        return y

    @staticmethod
    @first_order("log_softmax")
    def backward(ctx, saved, dy):
        (y,) = saved
        wants_mask = ctx.needs_input_grad[3]
        scale = 1.0 if wants_mask else ctx.scale
        dx = log_softmax_backward(dy, y, ctx.dim, scale, ctx.hides, ctx.backend)
        dx, dmask = gradients_of(dx, ctx.scale, ctx.mask_dtype if wants_mask else None)
        return dx, None, None, dmask, None, None


def _forward_fake(x, dim, scale, mask, is_causal, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("log_softmax_forward", _forward_fake)
def log_softmax_forward(
    x: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool, backend: str
) -> Tensor:
    return LOG_SOFTMAX.modules[backend].forward(x, dim, scale, mask, is_causal)


def _backward_fake(dy, y, dim, scale, hides, backend):
    return torch.empty_like(y)


@kernel_op("log_softmax_backward", _backward_fake)
def log_softmax_backward(
    dy: Tensor, y: Tensor, dim: int, scale: float, hides: bool, backend: str
) -> Tensor:
    """dx = scale * (dy - exp(y) * sum(dy)), where `hides` of those elements that are not -inf."""
    return LOG_SOFTMAX.modules[backend].backward(dy, y, dim, scale, hides)
