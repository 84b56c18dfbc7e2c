"""BERT's input: the sum of token, position and segment embeddings, normalised and dropped out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkernels.models.config import TransformerConfig
from slimkernels.nn import LayerNorm
from slimkernels.ops._checks import is_under_autocast
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
        self,
        input_ids: Tensor,
        segment_ids: Tensor,
        position_ids: Tensor,
        *,
        for_decoder: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (..., C) of ids (...), and the (V, C) matrix for the tied decoder.

        Under autocast the hidden states, and so the whole residual stream, are in its dtype, and so
        is the matrix, unless for_decoder says that nobody will multiply by it.
        """
        norm, weight = self.norm, self.token.weight
        dtype = weight.dtype
        if for_decoder and is_under_autocast(weight):
            dtype = torch.get_autocast_dtype(weight.device.type)
        # _TiedEmbedding looks the tokens up, and its rows are a table in which each is used once.
        tokens, decoder_weight = _TiedEmbedding.apply(weight, input_ids.flatten(), dtype)
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
