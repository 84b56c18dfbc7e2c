"""Products over tokens of ragged sequences, one after the other along T, for the definitions.

A weight between tokens of two sequences is zero, but 0 * NaN is NaN: summed over all tokens, what
is not finite in one sequence would reach the others. Here it reaches its own only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of(cu_seqlens: Tensor, T: int) -> Tensor:
    """Each token's sequence, (T,) int64, counted from 1; 0 and past the end if there is none."""
    tokens = torch.arange(T, dtype=torch.int32, device=cu_seqlens.device)
    # The last that starts at or before it: empty ones are passed.
    return torch.searchsorted(cu_seqlens, tokens, right=True)


class Scores(torch.autograd.Function):
    """q @ k^T, (H, Tq, Tk)."""

    @staticmethod
    def forward(ctx, q, k, of_q, of_k, sequences):
        ctx.save_for_backward(q, k, of_q, of_k)
        ctx.sequences = sequences
        return q @ k.mT

    @staticmethod
    def backward(ctx, dscores):
        q, k, of_q, of_k = ctx.saved_tensors
        dq = _product(dscores, k, of_q, of_k, ctx.sequences)
        return dq, _product(dscores.mT, q, of_k, of_q, ctx.sequences), None, None, None


class Weighted(torch.autograd.Function):
    """p @ v, (H, Tq, D), for p that is zero between sequences."""

    @staticmethod
    def forward(ctx, p, v, of_q, of_k, sequences):
        ctx.save_for_backward(p, v, of_q, of_k)
        ctx.sequences = sequences
        return _product(p, v, of_q, of_k, sequences)

    @staticmethod
    def backward(ctx, dy):
        p, v, of_q, of_k = ctx.saved_tensors
        return dy @ v.mT, _product(p.mT, dy, of_k, of_q, ctx.sequences), None, None, None


def _product(weights, x, of_rows, of_x, sequences):
    """weights @ x; what is not finite in x is added to all rows of its sequence instead."""
    finite = x.isfinite()
    strays = x.new_zeros(x.shape[0], sequences + 2, x.shape[-1])
    strays = strays.index_add(1, of_x, x.masked_fill(finite, 0.0))
    return weights @ x.masked_fill(~finite, 0.0) + strays.index_select(1, of_rows)
