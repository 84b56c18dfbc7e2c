"""What softmax and log_softmax share: their arguments, and the scores that they are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels.ops._checks import (
    FLOATING,
    check_dense,
    check_flag,
    check_integer,
    check_mask,
    check_number,
    check_tensor,
)


def scores_of(
    x: Tensor, dim: int, scale: float, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor | None]:
    """The scores that the definitions take, and which rows see nothing; None where all is seen.

    What is hidden is -inf, except in rows that see nothing, where 0 keeps NaN out of the gradient.
    """
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    seen = None
    if is_causal:
        seen = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
    if mask is not None:
        shows = mask
        if mask.is_floating_point():
            # Widened first, so that its gradient is summed in the wide dtype.
            shows, scores = mask != -math.inf, scores + mask.to(scores.dtype)
        seen = shows if seen is None else seen & shows
    if seen is None:
        return scores, None
    nothing = ~seen.any(dim, keepdim=True)
    return scores.masked_fill(~seen, -math.inf).masked_fill(nothing, 0.0), nothing


def converted(op: str, dtype: torch.dtype | None, input: Tensor, *others: Tensor | None) -> list:
    """`input` in `dtype`, and with it those others, masks and the like, that have input's own; they
    may stay float32."""
    if dtype is None:
        return [input, *others]
    if dtype not in FLOATING:
        raise ValueError(
            f"{op}: dtype must be float32, float16, bfloat16, float64 or None; got {dtype!r}"
        )
    check_dense(op, "input", input)
    if input.is_complex():  # which the checks refuse
        return [input, *others]
    own = (input.dtype,) if input.dtype in FLOATING and input.dtype != torch.float32 else ()
    others = [t.to(dtype) if isinstance(t, Tensor) and t.dtype in own else t for t in others]
    return [input.to(dtype), *others]


def softmax_arguments(op, input, dim=-1, *, scale=1.0, mask=None, is_causal=False):
    """x (..., N) and dim -1, or x (..., N, inner) and dim -2; scale; mask, expanded; is_causal.

    The dimensions after the one that sums to 1 are one: kernels have rows or columns.
    """
    check_tensor(op, "input", input)
    check_mask(op, mask, input)
    rank = input.dim()
    if rank == 0:
        raise ValueError(f"{op}: input must have a dimension; got shape ()")
    check_integer(op, "dim", dim)
    check_number(op, "scale", scale)
    check_flag(op, "is_causal", is_causal)
    if not -rank <= dim < rank:
        raise ValueError(
            f"{op}: dim must be in [{-rank}, {rank}) for input {tuple(input.shape)}; got {dim}"
        )
    last = dim in (-1, rank - 1)
    if is_causal and not (last and rank >= 2):
        raise ValueError(
            f"{op}: is_causal needs input (..., Tq, Tk) and dim -1; got input "
            f"{tuple(input.shape)} and dim {dim}"
        )
    mask = None if mask is None else mask.expand(input.shape)  # strides of 0, no memory
    if last:
        return input, -1, scale, mask, is_causal
    first = dim % rank
    if math.prod(input.shape[first + 1 :]) == 1:
        x, mask = (None if t is None else t.flatten(first) for t in (input, mask))
        return x, -1, scale, mask, is_causal
    if first < rank - 2:
        input, mask = (None if t is None else t.flatten(first + 1) for t in (input, mask))
    return input, -2, scale, mask, is_causal
