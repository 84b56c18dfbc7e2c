"""BERT's input: the sum of token, position and segment embeddings, normalised and dropped out."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from slimkernels.models.config import TransformerConfig
from slimkernels.nn import LayerNorm
from slimkernels.ops.embedding import embedding


class Embedding(nn.Module):
    """Ids to hidden states, and the token table as the decoder is to use it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.config = config
        self.token = nn.Embedding(config.vocab_size, C)
        self.position = nn.Embedding(config.max_positions, C)
        self.segment = nn.Embedding(config.type_vocab_size, C)
        self.norm = LayerNorm(C, config.layer_norm_eps)

    def forward(
        self, input_ids: Tensor, segment_ids: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (..., C) of ids (...), and the (V, C) matrix for the tied decoder.

        Under autocast the hidden states, and so the whole residual stream, are in its dtype.
        """
        norm = self.norm
        # _TiedEmbedding looks the tokens up, and its rows are a table in which each is used once.
        tokens, decoder_weight = _TiedEmbedding.apply(self.token.weight, input_ids.flatten())
        each = torch.arange(input_ids.numel(), device=input_ids.device)
        hidden = embedding(
            *(each.view(input_ids.shape), tokens),
            position_ids=position_ids,
            position_weight=self.position.weight,
            segment_ids=segment_ids,
            segment_weight=self.segment.weight,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            dropout_p=self.config.dropout_p,
            training=self.training,
        )
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        return hidden, decoder_weight


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
