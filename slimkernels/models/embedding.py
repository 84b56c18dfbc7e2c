"""A model's input: token, position and segment embeddings, normalised and dropped out."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.models.block import norm_of
from slimkernels.models.config import TransformerConfig
from slimkernels.nn import LayerNorm
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
        self, input_ids: Tensor, segment_ids: Tensor | None, position_ids: Tensor | None
    ) -> Embedded:
        """What the first block reads, of ids (...); segments and positions where there are any.

        Under autocast the hidden states are in its dtype, and so is the whole residual stream; but
        with norm_first, where the stream adds up what all blocks give, it stays in the table's.
        """
        config = self.config
        # _TiedEmbedding looks the tokens up, and its rows are a table in which each is used once.
        tokens, table = _TiedEmbedding.apply(self.token.weight, input_ids.flatten())
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
    """weight[ids], and weight itself for the tied decoder (Press and Wolf 2017), in one node.

    Apart, the look-up's gradient is a (V, C) matrix of zeros with a few rows set, which autograd
    then adds to the decoder's: four passes over a matrix of V rows. Here a few rows go
    straight into the decoder's gradient.
    """

    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return weight.index_select(0, ids), weight.view_as(weight)

    @staticmethod
    def backward(ctx, drows, dweight):
        (ids,) = ctx.saved_tensors
        if drows is None:
            return dweight, None
        if dweight is None:
            dweight = drows.new_zeros(ctx.shape)
        # Out of place where a graph is recorded, and on a GPU, where index_add_ has no fixed order
        # of sums.
        is_recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if drows.device.type == "cpu" and not is_recorded:
            # As a rule the decoder's product has just made dweight, and nobody else holds it.
            if not dweight.is_contiguous() or _is_held(dweight, drows):
                dweight = dweight.clone(memory_format=torch.contiguous_format)
            return dweight.index_add_(0, ids, drows), None
        rows = torch.ops.aten.embedding_dense_backward(drows, ids, ctx.shape[0], -1, False)
        return dweight + rows, None


def _is_held(gradient: Tensor, other: Tensor) -> bool:
    """Whether somebody besides this backward may look at `gradient`: a caller of autograd.grad who
    gave it or asked for it, a node that got the same one, a hook that kept it. Autograd asks the
    same before it adds gradients up in place. `other` came here as `gradient` did: if nobody holds
    it, it has the references that are autograd's own."""
    base = gradient._base  # F.linear's is a view of a product that only the view keeps
    if base is not None and max(base._use_count(), sys.getrefcount(base) - 1) > 2:
        return True
    if gradient._use_count() > 1 or other._use_count() > 1:
        return True
    return sys.getrefcount(gradient) > sys.getrefcount(other)
