"""Padding, cut out of a batch before the first block and put back after the last."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Ragged(NamedTuple):
    """Where the real tokens of a padded batch (B, T) are.

    tokens      (N,) int64: their places in the flattened rectangle, ascending
    cu_seqlens  (B+1,) int32: which of them are of row i
    shape       B and T
    """

    tokens: Tensor
    cu_seqlens: Tensor
    shape: tuple[int, int]

    @property
    def position_ids(self) -> Tensor:
        """(N,): each token's column in the rectangle."""
        return self.tokens % self.shape[1]

    def take(self, rectangle: Tensor | None) -> Tensor | None:
        """The real tokens' rows (N, ...) of (B, T, ...)."""
        if rectangle is None:
            return None
        rows = rectangle.reshape(-1, *rectangle.shape[2:])
        return rows if self._is_full else rows.index_select(0, self.tokens)

    def put_back(self, rows: Tensor) -> Tensor:
        """(B, T, ...) of the real tokens' rows (N, ...), 0 where there is padding."""
        if not self._is_full:
            B, T = self.shape
            whole = rows.new_zeros(B * T, *rows.shape[1:])
            rows = whole.index_copy_(0, self.tokens, rows)
        return rows.view(*self.shape, *rows.shape[1:])

    @property
    def _is_full(self) -> bool:
        return len(self.tokens) == self.shape[0] * self.shape[1]


def unpad(input_ids: Tensor, attention_mask: Tensor | None) -> Ragged:
    """The real tokens of input_ids (B, T): where attention_mask, if there is one, is not 0.

    Caution  waits for the device if there is a mask: the host must know how many tokens are real
    """
    B, T = input_ids.shape
    device = input_ids.device
    if attention_mask is None:
        cu_seqlens = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=device)
        return Ragged(torch.arange(B * T, device=device), cu_seqlens, (B, T))
    tokens = attention_mask.flatten().nonzero().squeeze(1)
    lengths = (attention_mask != 0).sum(1)
    return Ragged(tokens, F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), (B, T))
