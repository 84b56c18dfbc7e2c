"""Softmax with what attention puts before it: softmax(input * scale) where a mask allows.

Subtracting the row's greatest score keeps exp from overflowing; rows longer than a tile are
reduced in one pass as in Milakov and Gimelshein, Online normalizer calculation (2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels.dispatch import Op, kernel_op, needs_gradient
from slimkernels.ops._checks import check_integer, check_mask, check_number, check_tensor
from slimkernels.ops._first_order import first_order


def softmax_reference(x: Tensor, scale: float, mask: Tensor | None, is_causal: bool) -> Tensor:
    """The definition, over the last dimension. A row with nothing to take part is zero."""
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if is_causal:
        causal = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        mask = causal if mask is None else mask & causal
    if mask is None:
        return torch.softmax(scores, -1).to(x.dtype)
    y = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
    return y.masked_fill(~mask.any(-1, keepdim=True), 0.0).to(x.dtype)


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """softmax(input * scale) over `dim`, of the elements that take part; the others are 0.

    input      (...) float32, float16, bfloat16 or float64
    dim        dimension that sums to 1; any but the last is moved last first, which costs a
               copy of input, and leaves the result a view with that dimension moved back
    scale      multiplies input before the softmax
    mask       bool, broadcastable to input, True where an element takes part, as attn_mask in
               torch's attention. It is read through its strides, never expanded in memory,
               unless its broadcast dimensions alternate with others more than twice.
    is_causal  for input (..., Tq, Tk) and dim -1: row i sees columns j <= i, counted from the
               top left as in torch
    Returns    input's shape and dtype; computed in float32 (float64 for float64). A row where
               nothing takes part is zero and has zero gradient; a row whose elements are all
               -inf is NaN, as in torch.softmax.
    Saves      the output
    Errors     ValueError naming the argument whose shape, dtype or device is wrong
    """
    args = _arguments(input, dim, scale=scale, mask=mask, is_causal=is_causal)
    chosen = SOFTMAX.select(*args, backend=backend)
    if chosen == "torch":
        y = softmax_reference(*args)
    elif needs_gradient(input):
        y = _Softmax.apply(*args, chosen)
    else:
        y = softmax_forward(*args, chosen)
    return y.movedim(-1, dim)


def _arguments(input, dim=-1, *, scale=1.0, mask=None, is_causal=False):
    check_tensor("softmax", "input", input)
    check_mask("softmax", mask, input)
    rank = input.dim()
    if rank == 0:
        raise ValueError("softmax: input must have a dimension; got shape ()")
    check_integer("softmax", "dim", dim)
    check_number("softmax", "scale", scale)
    if not -rank <= dim < rank:
        raise ValueError(
            f"softmax: dim must be in [{-rank}, {rank}) for input {tuple(input.shape)}; got {dim}"
        )
    last = dim in (-1, rank - 1)
    if is_causal and not (last and rank >= 2):
        raise ValueError(
            f"softmax: is_causal needs input (..., Tq, Tk) and dim -1; got input "
            f"{tuple(input.shape)} and dim {dim}"
        )
    if mask is not None:
        mask = mask.expand(input.shape)  # strides of 0, no memory
        mask = mask if last else mask.movedim(dim, -1)
    return input if last else input.movedim(dim, -1), scale, mask, is_causal


# Order: triton before cuda until a table of GPU measurements says otherwise.
SOFTMAX = Op("softmax", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, mask, is_causal, backend):
        y = softmax_forward(x, scale, mask, is_causal, backend)
        ctx.save_for_backward(y)
        ctx.scale = scale
        ctx.backend = backend  # backward never selects
        return y

    @staticmethod
    @first_order("softmax")
    def backward(ctx, saved, dy):
        (y,) = saved
        return softmax_backward(dy, y, ctx.scale, ctx.backend), None, None, None, None


def _forward_fake(x, scale, mask, is_causal, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("softmax_forward", _forward_fake)
def softmax_forward(
    x: Tensor, scale: float, mask: Tensor | None, is_causal: bool, backend: str
) -> Tensor:
    return SOFTMAX.modules[backend].forward(x, scale, mask, is_causal)


def _backward_fake(dy, y, scale, backend):
    return torch.empty_like(y)


@kernel_op("softmax_backward", _backward_fake)
def softmax_backward(dy: Tensor, y: Tensor, scale: float, backend: str) -> Tensor:
    """dx = scale * y * (dy - sum(dy * y)): the mask is in y, which is 0 where it hides."""
    return SOFTMAX.modules[backend].backward(dy, y, scale)
