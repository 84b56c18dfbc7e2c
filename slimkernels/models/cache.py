"""Keys and values of the tokens so far, for a model that makes one token after the other.

A prompt is computed ragged, as in training, and each of its tokens is put at its place in its row;
from then on every row has one new token a step, wherever it ends, and no padding is ever seen.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """One block's keys and values (B, Hkv, S, D), and those of the encoder's hidden states."""

    def __init__(self, step: Cache) -> None:
        self.step = step
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.memory: tuple[Tensor, Tensor] | None = None

    def write(self, key: Tensor, value: Tensor) -> None:
        """Puts keys and values (T, Hkv, D) of this step's tokens at their places."""
        step = self.step
        if self.keys is None:
            B = len(step.lengths)
            # Zeros, because a place that nobody has taken is multiplied by a weight of 0.
            self.keys, self.values = (
                t.new_zeros(B, t.shape[1], step.capacity, t.shape[2]) for t in (key, value)
            )
        self.keys[step.rows, :, step.places] = key
        self.values[step.rows, :, step.places] = value

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, S, D), S being where the longest row ends."""
        longest = self.step.longest
        return self.keys[:, :, :longest], self.values[:, :, :longest]


class Cache:
    """What all blocks share: where this step's tokens go.

    lengths       (B,) int32: tokens in each row before this step
    rows, places  of each token of this step
    cu_seqlens    (B+1,) int32: which of this step's tokens are of row i
    longest       tokens in the longest row after this step
    capacity      tokens that a row can have at most
    """

    def __init__(self, layers: int, cu_seqlens: Tensor, longest: int, new_tokens: int) -> None:
        """For prompts that cu_seqlens bounds, the longest of `longest` tokens."""
        self.longest, self.capacity = longest, longest + new_tokens
        self.is_prompt = True
        self.lengths = torch.zeros_like(cu_seqlens[1:])
        self._take(cu_seqlens)
        self.layers = [LayerCache(self) for _ in range(layers)]

    def advance(self) -> None:
        """On to a step of one token in every row."""
        self.lengths = self.lengths + self.cu_seqlens.diff()
        self.longest += 1
        self.is_prompt = False
        B = len(self.lengths)
        self._take(torch.arange(B + 1, dtype=torch.int32, device=self.lengths.device))

    def _take(self, cu_seqlens: Tensor) -> None:
        self.cu_seqlens = cu_seqlens
        each = torch.arange(len(self.lengths), device=cu_seqlens.device)
        self.rows = each.repeat_interleave(cu_seqlens.diff())
        token = torch.arange(len(self.rows), device=cu_seqlens.device)
        self.places = token - cu_seqlens[self.rows] + self.lengths[self.rows]
