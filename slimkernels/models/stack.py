"""A stack of blocks with the embedding before it: a decoder, or one half of an encoder-decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels.models.block import Block, Memory, Places
from slimkernels.models.cache import Cache
from slimkernels.models.config import TransformerConfig
from slimkernels.models.embedding import Embedding
from slimkernels.ops._attention_variant import t5_relative_bias
from slimkernels.ops.rotary import rotary_tables


class Stack(nn.Module):
    """Token ids to hidden states, of whatever kind of positions the config has."""

    def __init__(
        self,
        config: TransformerConfig,
        layers: int,
        *,
        is_causal: bool,
        reads_memory: bool = False,
        token: nn.Embedding | None = None,
    ) -> None:
        """reads_memory: it attends to an encoder. token: the table of another stack, shared."""
        super().__init__()
        self.config, self.is_causal = config, is_causal
        self.embedding = Embedding(config, token)
        self.layers = nn.ModuleList(Block(config, reads_memory=reads_memory) for _ in range(layers))
        if config.positions == "rotary":
            self.rotary = Rotary(config)
        elif config.positions == "relative":
            self.relative = nn.Embedding(config.relative_buckets, config.num_heads)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        memory: Memory | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the last block's norm, and the token table for a tied output.

        input_ids, position_ids  (T,) with cu_seqlens (B+1,) int32, or (B, T)
        memory                   an encoder's hidden states, ragged if these are
        cache                    keys and values of the tokens before. Ragged
        Returns                  (T, C) or (B, T, C), and (V, C)
        """
        config = self.config
        hidden, residual, table = self.embedding(input_ids, None, position_ids)
        places = self._places(position_ids)
        for i, layer in enumerate(self.layers):
            hidden, residual = layer(
                *(hidden, residual),
                cu_seqlens=cu_seqlens,
                is_causal=self.is_causal,
                places=places,
                memory=memory,
                cache=None if cache is None else cache.layers[i],
            )
        if config.output_dropout_p:
            hidden = F.dropout(hidden, config.output_dropout_p, self.training)
        return hidden, table

    def _places(self, position_ids):
        config = self.config
        if config.positions == "rotary":
            return Places(turns=(self.rotary.cos, self.rotary.sin, position_ids))
        if config.positions == "relative":
            relative = t5_relative_bias(
                self.relative.weight,
                bidirectional=not self.is_causal,
                max_distance=config.relative_max_distance,
            )
            return Places(relative=relative)
        return Places()


class Rotary(nn.Module):
    """The tables of rotary positions, float32 whatever the model's dtype becomes."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.make_tables(None)

    def make_tables(self, device: torch.device | str | None) -> None:
        """The tables on `device`; None for torch's default."""
        config = self.config
        T, D, base = config.max_positions, config.head_size, config.rotary_base
        if config.rotary_stretch is None:
            tables = rotary_tables(T, D, base, device=device)
        else:
            tables = _stretched_tables(T, D, base, *config.rotary_stretch, device=device)
        self.cos, self.sin = (nn.Buffer(table, persistent=False) for table in tables)

    def _apply(self, fn, recurse=True):
        # What moves a module to a device also casts it; half precision would turn by wrong angles.
        before = self.cos, self.sin
        super()._apply(fn, recurse)
        for name, table in zip(("cos", "sin"), before, strict=True):
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, nn.Buffer(table.to(moved.device), persistent=False))
        return self


def _stretched_tables(T, D, base, factor, low, high, trained, *, device):
    """rotary_tables(), the slow wavelengths stretched, as TransformerConfig.rotary_stretch says."""
    wide = {"dtype": torch.float64, "device": device}
    frequencies = base ** -(torch.arange(0, D, 2, **wide) / D)
    turns = trained * frequencies / (2 * math.pi)  # in the sequences seen in training
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    angles = torch.outer(torch.arange(T, **wide), frequencies * (kept + (1 - kept) / factor))
    return angles.cos().float(), angles.sin().float()
