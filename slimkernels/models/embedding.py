"""A model's input: token, position and segment embeddings, normalised and dropped out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.models.block import norm_of
from slimkernels.models.config import TransformerConfig
from slimkernels.nn import LayerNorm
from slimkernels.ops._checks import is_under_autocast
from slimkernels.ops.embedding import embedding


class Embedded(NamedTuple):
    """The first block's input, and the token table as a tied decoder is to use it.

    hidden    (..., C), normalised
    residual  (..., C): hidden again, or with norm_first the sum before the norm
    table     (V, C): using it, not the parameter, saves a pass over the parameter's gradient
    """

    hidden: Tensor
    residual: Tensor
    table: Tensor


class Embedding(nn.Module):
    """Ids to hidden states. The config says which parts there are besides the tokens."""

    def __init__(self, config: TransformerConfig, token: nn.Embedding | None = None) -> None:
        """token: the table of another part of the model, to share it."""
        super().__init__()
        C = config.hidden_size
        self.config = config
        self.token = nn.Embedding(config.vocab_size, C) if token is None else token
        if config.positions == "learned":
            self.position = nn.Embedding(config.max_positions + config.position_offset, C)
        if config.type_vocab_size:
            self.segment = nn.Embedding(config.type_vocab_size, C)
        self.norm = norm_of(config)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        *,
        multiplies: bool = False,
    ) -> Embedded:
        """What the first block reads, of ids (...); segments and positions where there are any.

        Under autocast the hidden states are in its dtype, and so is the whole residual stream; but
        with norm_first, where the stream adds up what all blocks give, it stays in the table's.

        multiplies: the table is for torch's product, which under autocast would convert it, and its
        gradient back; it is then in autocast's dtype, and a pass over its gradient is saved.
        """
        config, dtype = self.config, self.token.weight.dtype
        if multiplies and is_under_autocast(self.token.weight):
            dtype = torch.get_autocast_dtype(self.token.weight.device.type)
        # _TiedEmbedding looks the tokens up, and its rows are a table in which each is used once.
        tokens, table = _TiedEmbedding.apply(self.token.weight, input_ids.flatten(), dtype)
        if config.embedding_scale != 1.0:
            tokens = tokens * config.embedding_scale
        each = torch.arange(input_ids.numel(), device=input_ids.device)
        parts = {"dropout_p": config.dropout_p, "training": self.training}
        if config.positions == "learned":
            if config.position_offset:
                position_ids = position_ids + config.position_offset
            parts |= {"position_ids": position_ids, "position_weight": self.position.weight}
        if config.type_vocab_size:
            parts |= {"segment_ids": segment_ids, "segment_weight": self.segment.weight}
        if not config.norm_first and isinstance(self.norm, LayerNorm):
            norm = self.norm
            parts |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
            hidden = residual = _cast(embedding(each.view(input_ids.shape), tokens, **parts))
        else:
            residual = embedding(each.view(input_ids.shape), tokens, **parts)
            hidden = _cast(self.norm(residual))
            residual = residual if config.norm_first else hidden
        return Embedded(hidden, residual, table)


def _cast(hidden):
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


class _TiedEmbedding(torch.autograd.Function):
    """weight[ids], and weight in dtype for the tied decoder (Press and Wolf 2017), in one node.

    Apart, the look-up's gradient is a (V, C) matrix of zeros with a few rows set, which autograd
    then adds to the decoder's: four passes over a matrix of V rows. Here a few rows are added to a
    copy of the decoder's gradient: two passes, and none more under autocast, whose dtype has to be
    converted. The gradient itself is not to be written: a hook, another node or a caller of
    autograd.grad may hold it, or a tensor that shares its memory.
    """

    @staticmethod
    def forward(ctx, weight, ids, dtype):
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        ctx.set_materialize_grads(False)
        matrix = weight.view_as(weight) if dtype == weight.dtype else weight.to(dtype)
        return weight.index_select(0, ids), matrix

    @staticmethod
    def backward(ctx, drows, dweight):
        (ids,) = ctx.saved_tensors
        if drows is None:
            return None if dweight is None else dweight.to(ctx.dtype), None, None
        # Not where a graph is recorded, nor on a GPU, where index_add_ has no fixed order of sums.
        is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if drows.device.type == "cpu" and not is_recorded:
            if dweight is None:
                total = drows.new_zeros(ctx.shape)
            else:
                layout = torch.contiguous_format
                total = dweight.to(ctx.dtype, copy=True, memory_format=layout)
            return total.index_add_(0, ids, drows), None, None
        rows = torch.ops.aten.embedding_dense_backward(drows, ids, ctx.shape[0], -1, False)
        return rows if dweight is None else dweight + rows, None, None
