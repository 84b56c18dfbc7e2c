"""The transformer block, the only one: attention and a feed-forward layer, each with its residual.

Vaswani et al. 2017. A block is two branches, and each ends in one fused pass,
``add_layer_norm(branch, residual)``, which drops out the branch, adds it to the residual stream
and normalises the sum. That pass returns both the normalised hidden states, which the next branch
reads, and the sum, so that where the norm stands is a choice of what the residual stream carries:

    post-norm   the normalised hidden states (BERT)
    pre-norm    the sum (Xiong et al. 2020); the norm that ends a block is then the one that the
                next block begins with, the first block's is the embedding's, and the last block's
                is the model's final norm
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.models.config import TransformerConfig
from slimkernels.nn import LayerNorm
from slimkernels.ops.add_layer_norm import add_layer_norm
from slimkernels.ops.gelu import gelu
from slimkernels.ops.linear import linear
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention


class Wanted(NamedTuple):
    """The tokens of a ragged batch whose hidden states somebody reads.

    positions   (Q,) int64, ascending: indices into the batch's T tokens
    cu_seqlens  (B+1,) int32: which of them are of sequence i
    """

    positions: Tensor
    cu_seqlens: Tensor


class Block(nn.Module):
    """One block on ragged hidden states (T, C), or on padded ones (B, T, C)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        C = config.hidden_size
        self.qkv = nn.Linear(C, 3 * C)  # one product for query, key and value
        self.attention_output = nn.Linear(C, C)
        self.attention_norm = LayerNorm(C, config.layer_norm_eps)
        self.intermediate = nn.Linear(C, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, C)
        self.output_norm = LayerNorm(C, config.layer_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        key_lengths: Tensor | None = None,
        is_causal: bool = False,
        wanted: Wanted | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two streams after this block.

        hidden       (T, C) with cu_seqlens, or (B, T, C): what the first branch reads
        residual     like hidden: what its output is added to; post-norm takes hidden again
        cu_seqlens   (B+1,) int32: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
        key_lengths  (B,) int32: tokens of row i at and after key_lengths[i] are padding
        is_causal    a token sees itself and those before it
        wanted       compute these tokens alone, which still see all of their sequence: for the
                     last block of a model that reads few of its tokens. Ragged, not causal
        Returns      (hidden, residual) for the next block, of the wanted tokens if they are given
        Errors       ValueError for two of these that do not go together
        """
        _check_options(cu_seqlens, key_lengths, is_causal, wanted)
        if wanted is None:
            branch = self._attend(hidden, cu_seqlens, key_lengths, is_causal)
        else:
            branch = self._attend_from(wanted, hidden, cu_seqlens)
            residual = residual.index_select(0, wanted.positions)
        hidden, residual = self._add_norm(branch, residual, self.attention_norm)
        x = activate(hidden, self.intermediate, self.config.activation)
        branch = linear(x, self.output.weight, self.output.bias)
        return self._add_norm(branch, residual, self.output_norm)

    def _attend(self, hidden, cu_seqlens, key_lengths, is_causal):
        config = self.config
        dropout_p = config.attention_dropout_p if self.training else 0.0
        qkv = linear(hidden, self.qkv.weight, self.qkv.bias)
        qkv = qkv.view(*hidden.shape[:-1], 3, config.num_heads, config.head_size)
        q, k, v = qkv.unbind(-3)  # (T, H, D) or (B, T, H, D): views, never copied
        if cu_seqlens is not None:
            y = scaled_dot_product_attention(
                q, k, v, cu_seqlens=cu_seqlens, is_causal=is_causal, dropout_p=dropout_p
            )
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
            y = scaled_dot_product_attention(
                q, k, v, key_lengths=key_lengths, is_causal=is_causal, dropout_p=dropout_p
            ).transpose(1, 2)
        return linear(y.flatten(-2), self.attention_output.weight, self.attention_output.bias)

    def _attend_from(self, wanted, hidden, cu_seqlens):
        """Attention of the wanted tokens to all keys of their sequences."""
        config, C = self.config, self.config.hidden_size
        weights, biases = (t.split([C, 2 * C]) for t in (self.qkv.weight, self.qkv.bias))
        q = linear(hidden.index_select(0, wanted.positions), weights[0], biases[0])
        kv = linear(hidden, weights[1], biases[1])
        heads = config.num_heads, config.head_size
        k, v = kv.unflatten(-1, (2, *heads)).unbind(1)  # (T, H, D)
        y = scaled_dot_product_attention(
            q.unflatten(-1, heads),  # (Q, H, D)
            k,
            v,
            cu_seqlens=(wanted.cu_seqlens, cu_seqlens),
            dropout_p=config.attention_dropout_p if self.training else 0.0,
        )
        return linear(y.flatten(-2), self.attention_output.weight, self.attention_output.bias)

    def _add_norm(self, branch, residual, norm):
        config = self.config
        y, total = add_layer_norm(
            # Under autocast products come in its dtype; the residual stream decides.
            branch.to(residual.dtype),
            residual,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=config.dropout_p if self.training else 0.0,
        )
        return y, total if config.norm_first else y


def _check_options(cu_seqlens, key_lengths, is_causal, wanted):
    if cu_seqlens is not None and key_lengths is not None:
        raise ValueError("Block: key_lengths must be None with cu_seqlens, which has the lengths")
    if wanted is not None and cu_seqlens is None:
        raise ValueError("Block: cu_seqlens must be given with wanted; got None")
    if wanted is not None and is_causal:
        raise ValueError("Block: is_causal must be False with wanted; got True")


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(x: Tensor, layer: nn.Linear, activation: str) -> Tensor:
    """gelu(layer(x)), the bias added inside gelu's pass instead of one of its own."""
    return gelu(linear(x, layer.weight), approximate=_APPROXIMATE[activation], bias=layer.bias)


@torch.no_grad()
def initialise(model: nn.Module, std: float) -> None:
    """Weights and embeddings from N(0, std), as BERT; biases 0, and norms the identity."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
