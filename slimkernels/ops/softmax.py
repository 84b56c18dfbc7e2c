"""Softmax with what attention puts around it: softmax(input * scale + mask), sinks and dropout.

Subtracting the row's greatest score keeps exp from overflowing; rows longer than a tile are
reduced in one pass as in Milakov and Gimelshein, Online normalizer calculation (2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import Op, kernel_op, needs_gradient
from slimkernels.ops._checks import check_dropout, check_flag, check_parameter
from slimkernels.ops._dropout import draw_seed, dropped
from slimkernels.ops._first_order import first_order
from slimkernels.ops._softmax import converted, scores_of, softmax_arguments


def softmax_reference(
    x: Tensor,
    dim: int = -1,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition, over dim -1 or -2. A row with nothing to take part is zero."""
    scores, nothing = scores_of(x, dim, scale, mask, is_causal)
    if sinks is None:
        y = torch.softmax(scores, dim)
    else:  # a last score, of which nothing is returned
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        y = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1].contiguous()
    y = y if nothing is None else y.masked_fill(nothing, 0.0)
    y = y if seed is None else dropped(y, seed, dropout_p)
    return y.to(x.dtype)


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    is_causal: bool = False,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """dropout(softmax(input * scale + mask)) over `dim`, of the elements that take part.

    input      (...) float32, float16, bfloat16 or float64
    dim        dimension that sums to 1; any of them without a copy
    dtype      input, then of any real dtype, is cast to it first, in a pass of its own; None for
               no cast. A mask and sinks may still have input's own
    scale      multiplies input before the softmax
    mask       broadcastable to input, as attn_mask in torch's attention: bool, True where an
               element takes part; or floating, in input's dtype or float32, added to the scaled
               input, where -inf hides as False does. It is read through its strides, never
               expanded in memory, unless its broadcast dimensions alternate with others more than
               twice, or stand before or after `dim` beside others. A floating one gets its
               gradient, in which -inf has none.
    is_causal  for input (..., Tq, Tk) and dim -1: row i sees columns j <= i, counted from the
               top left as in torch
    sinks      (H,), in input's dtype or float32, for input (..., H, Tq, Tk) and dim -1: the logits
               of one more score in each row of a head, neither scaled nor hidden, which takes its
               share of the sum and is not returned; they get their gradient
    dropout_p  probability of dropping an element of the result, in [0, 1); survivors are
               multiplied by 1 / (1 - dropout_p)
    training   False for no dropout
    Returns    input's shape and dtype, or `dtype`, without gaps; computed in float32 (float64 for
               float64). Hidden elements are 0. A row where nothing takes part is zero and has zero
               gradient if the gradient of its result is finite; a row without a sink whose
               elements are all -inf is NaN, as in torch.softmax.
    Saves      the output; with dropout, in its place, the output before dropout, and the seed: the
               gradient of what was dropped needs it. With sinks, one float32 a row.
    Errors     ValueError naming the argument whose shape, dtype or device is wrong
    """
    x, *_, dropout_p = args = _arguments(
        *(input, dim),
        dtype=dtype,
        scale=scale,
        mask=mask,
        is_causal=is_causal,
        sinks=sinks,
        dropout_p=dropout_p,
        training=training,
    )
    chosen = SOFTMAX.select(*args, backend=backend)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    if chosen == "torch":
        y = _by_torch(*args, seed)
    elif needs_gradient(x, mask, sinks):
        y, _ = _Softmax.apply(*args, seed, chosen)
    else:
        y = softmax_forward(*args, seed, chosen)[0]
    return y if x is input else y.view(input.shape)


def _by_torch(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    """The definition, in torch's one kernel where that is all of it."""
    if scale != 1 or is_causal or mask is not None or sinks is not None or seed is not None:
        return softmax_reference(x, dim, scale, mask, is_causal, sinks, dropout_p, seed)
    y = torch.softmax(x, dim)
    return y if y.dtype == x.dtype else y.to(x.dtype)  # autocast returns float32


def _arguments(
    input,
    dim=-1,
    *,
    dtype=None,
    scale=1.0,
    mask=None,
    is_causal=False,
    sinks=None,
    dropout_p=0.0,
    training=True,
):
    input, mask, sinks = converted("softmax", dtype, input, mask, sinks)
    x, *others = softmax_arguments(
        "softmax", input, dim, scale=scale, mask=mask, is_causal=is_causal
    )
    if sinks is not None:
        if input.dim() < 3 or others[0] != -1:
            raise ValueError(
                f"softmax: sinks need input (..., H, Tq, Tk) and dim -1; got input "
                f"{tuple(input.shape)} and dim {dim}"
            )
        check_parameter("softmax", "sinks", sinks, input, input.shape[-3], "the heads")
    check_dropout("softmax", dropout_p)
    check_flag("softmax", "training", training)
    return x, *others, sinks, dropout_p if training else 0.0


# Order: triton before cuda until a table of GPU measurements says otherwise.
SOFTMAX = Op("softmax", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, scale, mask, is_causal, sinks, dropout_p, seed, backend):
        y, kept, shares = softmax_forward(
            x, dim, scale, mask, is_causal, sinks, dropout_p, seed, backend
        )
        ctx.save_for_backward(y if seed is None else kept, shares, seed)
        ctx.dim, ctx.scale, ctx.dropout_p = dim, scale, dropout_p
        ctx.mask_dtype = None if mask is None else mask.dtype
        ctx.sinks_dtype = None if sinks is None else sinks.dtype
        ctx.backend = backend  # backward never selects
        ctx.set_materialize_grads(False)
        return y, kept  # an output, so that a second derivative finds its way here

    @staticmethod
    @first_order("softmax")
    def backward(ctx, saved, dy, _):
        y, shares, seed = saved
        wants_mask = ctx.needs_input_grad[3]
        scale = 1.0 if wants_mask else ctx.scale
        dx, dsinks = softmax_backward(
            *(dy, y, shares, ctx.dim, scale, ctx.dropout_p, seed, ctx.backend)
        )
        dsinks = None if ctx.sinks_dtype is None else dsinks.to(ctx.sinks_dtype)
        dx, dmask = gradients_of(dx, ctx.scale, ctx.mask_dtype if wants_mask else None)
        return dx, None, None, dmask, None, dsinks, None, None, None


def gradients_of(
    dscores: Tensor, scale: float, mask_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Those of x and of a mask that was added to x * scale, if its dtype is given; if not, the
    kernel has multiplied by scale. Autograd adds up what the mask was expanded over."""
    if mask_dtype is None:
        return dscores, None
    return dscores if scale == 1 else dscores * scale, dscores.to(mask_dtype)


def _forward_fake(x, dim, scale, mask, is_causal, sinks, dropout_p, seed, backend):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    kept = x.new_empty(0) if seed is None else torch.empty_like(y)
    return y, kept, x.new_empty((0,) if sinks is None else x.shape[:-1], dtype=torch.float32)


@kernel_op("softmax_forward", _forward_fake)
def softmax_forward(
    x: Tensor,
    dim: int,
    scale: float,
    mask: Tensor | None,
    is_causal: bool,
    sinks: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y; y before dropout, empty without; the sinks' shares of each row's sum, empty without."""
    return SOFTMAX.modules[backend].forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed)


def _backward_fake(dy, y, shares, dim, scale, dropout_p, seed, backend):
    heads = shares.shape[-2] if shares.dim() > 1 else 0
    return torch.empty_like(y), y.new_empty(heads, dtype=torch.float32)


@kernel_op("softmax_backward", _backward_fake)
def softmax_backward(
    dy: Tensor,
    y: Tensor,
    shares: Tensor,
    dim: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """With g what dropout lets through of dy, dot = sum(g * y):
    dx = scale * y * (g - dot), dsinks = -sum(share * dot) over a head's rows.

    y  before dropout. The mask is in it, which is 0 where it hides.
    """
    return SOFTMAX.modules[backend].backward(dy, y, shares, dim, scale, dropout_p, seed)
