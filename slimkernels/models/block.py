"""The transformer block, the only one: attention and a feed-forward layer, each with its residual.

Vaswani et al. 2017. A block is two branches, or three where a decoder reads an encoder, and each
ends in one fused pass, ``add_layer_norm(branch, residual)`` or ``add_rms_norm``, which drops out
the branch, adds it to the residual stream and normalises the sum. That pass returns both the
normalised hidden states, which the next branch reads, and the sum, so that where the norm stands
is a choice of what the residual stream carries:

    post-norm   the normalised hidden states (BERT)
    pre-norm    the sum (Xiong et al. 2020); the norm that ends a block is then the one that the
                next block begins with, the first block's is the embedding's, and the last block's
                is the model's final norm
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimkernels.models.cache import LayerCache
from slimkernels.models.config import GATED, TransformerConfig
from slimkernels.nn import LayerNorm, RMSNorm
from slimkernels.ops._attention_variant import AttentionVariant, RelativeBias
from slimkernels.ops.add_layer_norm import add_layer_norm, post_norm
from slimkernels.ops.add_rms_norm import add_rms_norm
from slimkernels.ops.geglu import geglu
from slimkernels.ops.gelu import gelu_of_product
from slimkernels.ops.linear import linear
from slimkernels.ops.rotary import rotary
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention
from slimkernels.ops.swiglu import swiglu


class Wanted(NamedTuple):
    """The tokens of a ragged batch whose hidden states somebody reads.

    positions   (Q,) int64, ascending: indices into the batch's T tokens
    cu_seqlens  (B+1,) int32: which of them are of sequence i
    """

    positions: Tensor
    cu_seqlens: Tensor


class Places(NamedTuple):
    """What a model's positions do to queries and keys: at most one of the two.

    turns     cos and sin for rotary(), and each token's position (T,) or (B, T)
    relative  the bias that attention adds by distance
    """

    turns: tuple[Tensor, Tensor, Tensor] | None = None
    relative: RelativeBias | None = None


class Memory(NamedTuple):
    """An encoder's hidden states (S, C) and cu_seqlens (B+1,) int32, or (B, S, C) and None."""

    hidden: Tensor
    cu_seqlens: Tensor | None


NOWHERE = Places()


class Block(nn.Module):
    """One block on ragged hidden states (T, C), or on padded ones (B, T, C)."""

    def __init__(self, config: TransformerConfig, *, reads_memory: bool = False) -> None:
        """reads_memory: whether it attends to an encoder's hidden states, too."""
        super().__init__()
        self.config = config
        C, widths = config.hidden_size, config.qkv_widths
        self.qkv = nn.Linear(C, sum(widths), config.bias)  # one product for query, key and value
        self.attention_output = nn.Linear(widths[0], C, config.bias)
        self.attention_norm = norm_of(config)
        if reads_memory:
            self.memory_query = nn.Linear(C, widths[0], config.bias)
            self.memory_key_value = nn.Linear(C, sum(widths[1:]), config.bias)
            self.memory_output = nn.Linear(widths[0], C, config.bias)
            self.memory_norm = norm_of(config)
        gates = 2 if config.is_gated else 1
        self.intermediate = nn.Linear(C, gates * config.intermediate_size, config.bias)
        self.output = nn.Linear(config.intermediate_size, C, config.bias)
        self.output_norm = norm_of(config)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        key_lengths: Tensor | None = None,
        is_causal: bool = False,
        wanted: Wanted | None = None,
        places: Places = NOWHERE,
        memory: Memory | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two streams after this block.

        hidden       (T, C) with cu_seqlens, or (B, T, C): what the first branch reads
        residual     like hidden: what its output is added to; post-norm takes hidden again
        cu_seqlens   (B+1,) int32: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
        key_lengths  (B,) int32: tokens of row i at and after key_lengths[i] are padding
        is_causal    a token sees itself and those before it
        wanted       compute these tokens alone, which still see all of their sequence: for the
                     last block of a model that reads few of its tokens. Ragged, not causal
        places       rotary or relative positions of the tokens; learned ones are in hidden already
        memory       what a block that reads_memory reads, ragged if hidden is
        cache        keys and values of the tokens before, which gets those of these. Ragged
        Returns      (hidden, residual) for the next block, of the wanted tokens if they are given
        Errors       ValueError for two of these that do not go together
        """
        _check_options(cu_seqlens, key_lengths, is_causal, wanted, places, cache)
        if wanted is None:
            branch = self._attend(hidden, cu_seqlens, key_lengths, is_causal, places, cache)
        else:
            branch = self._attend_from(wanted, hidden, cu_seqlens)
            residual = residual.index_select(0, wanted.positions)
        branch = affine(self.attention_output, branch)
        hidden, residual = self._add_norm(branch, residual, self.attention_norm)
        if memory is not None:
            branch = affine(self.memory_output, self._recall(hidden, cu_seqlens, memory, cache))
            hidden, residual = self._add_norm(branch, residual, self.memory_norm)
        x = activate(hidden, self.intermediate, self.config.activation)
        if self.training and self.config.activation_dropout_p:
            x = F.dropout(x, self.config.activation_dropout_p)
        return self._add_norm(affine(self.output, x), residual, self.output_norm)

    def _attend(self, hidden, cu_seqlens, key_lengths, is_causal, places, cache):
        joined = self._heads(affine(self.qkv, hidden))
        # (T, H, D) or (B, T, H, D): views, never copied
        heads = [self.config.num_heads, *[self.config.key_heads] * 2]
        q, k, v = torch.split_with_sizes(joined, heads, -2)
        if places.turns is not None:
            q, k = turn(q, k, *places.turns)
        if cache is not None:
            cache.write(k, v)
            if not cache.step.is_prompt:
                return self._attend_to_cache(q, cache, places)
        variant = None
        if places.relative is not None:
            variant = AttentionVariant(relative_bias=places.relative)
        return self._attention(
            *(q, k, v, cu_seqlens),
            key_lengths=key_lengths,
            is_causal=is_causal,
            variant=variant,
        )

    def _attend_from(self, wanted, hidden, cu_seqlens):
        """Attention of the wanted tokens to all keys of their sequences."""
        widths, bias = self.config.qkv_widths, self.qkv.bias
        rows = [widths[0], widths[1] + widths[2]]
        weights = self.qkv.weight.split(rows)
        biases = (None, None) if bias is None else bias.split(rows)
        q = self._heads(linear(hidden.index_select(0, wanted.positions), weights[0], biases[0]))
        k, v = self._heads(linear(hidden, weights[1], biases[1])).chunk(2, -2)  # (T, Hkv, D)
        return self._attention(q, k, v, (wanted.cu_seqlens, cu_seqlens))

    def _attend_to_cache(self, q, cache, places):
        """Attention of one new token a row, (B, H, D), to all that the cache has of its row."""
        lengths, variant = cache.step.lengths, None
        if places.relative is not None:
            variant = AttentionVariant(relative_bias=places.relative, causal_offset=lengths)
        y = scaled_dot_product_attention(
            *(q.unsqueeze(2), *cache.read()),
            key_lengths=lengths + 1,
            scale=self.config.attention_scale,
            enable_gqa=True,
            variant=variant,
        )
        return y.flatten(1)

    def _recall(self, hidden, cu_seqlens, memory, cache):
        """Attention to the encoder's hidden states, whose keys a cache has from the first step."""
        q = self._heads(affine(self.memory_query, hidden))
        if cache is None or cache.memory is None:
            joined = self._heads(affine(self.memory_key_value, memory.hidden))
            k, v = joined.chunk(2, -2)
            if cache is not None:
                cache.memory = k, v
        else:
            k, v = cache.memory
        boundaries = None if cu_seqlens is None else (cu_seqlens, memory.cu_seqlens)
        return self._attention(q, k, v, boundaries)

    def _heads(self, x):
        size = self.config.head_size  # unflatten() is slow Python
        return x.view(*x.shape[:-1], x.shape[-1] // size, size)

    def _attention(self, q, k, v, cu_seqlens, **options):
        """(..., H * D) from heads (T, H, D) with cu_seqlens, or (B, T, H, D)."""
        config = self.config
        options |= {
            "dropout_p": config.attention_dropout_p if self.training else 0.0,
            "scale": config.attention_scale,
            "enable_gqa": config.key_heads != config.num_heads,
        }
        if cu_seqlens is not None:
            options.pop("key_lengths", None)
            y = scaled_dot_product_attention(q, k, v, cu_seqlens=cu_seqlens, **options)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
            y = scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
        return y.flatten(-2)

    def _add_norm(self, branch, residual, norm):
        config = self.config
        # Under autocast products come in its dtype. The residual stream decides, unless it is the
        # float32 one of pre-norm, beside which the branch, and so the output, may be narrow.
        if not config.norm_first or residual.dtype != torch.float32:
            branch = branch.to(residual.dtype)
        args = branch, residual, norm.normalized_shape, norm.weight
        dropout_p = config.dropout_p if self.training else 0.0
        if config.norm == "rms_norm":
            y, total = add_rms_norm(*args, norm.eps, dropout_p=dropout_p)
        elif config.norm_first:
            y, total = add_layer_norm(*args, norm.bias, norm.eps, dropout_p=dropout_p)
        else:
            y = post_norm(*args, norm.bias, norm.eps, dropout_p=dropout_p)
        return y, total if config.norm_first else y


def _check_options(cu_seqlens, key_lengths, is_causal, wanted, places, cache):
    if cu_seqlens is not None and key_lengths is not None:
        raise ValueError("Block: key_lengths must be None with cu_seqlens, which has the lengths")
    if wanted is not None and cu_seqlens is None:
        raise ValueError("Block: cu_seqlens must be given with wanted; got None")
    if wanted is not None and is_causal:
        raise ValueError("Block: is_causal must be False with wanted; got True")
    if wanted is not None and places != NOWHERE:
        raise ValueError("Block: places must be none with wanted")
    if cache is not None and (cu_seqlens is None or wanted is not None):
        raise ValueError("Block: cache must come with cu_seqlens and without wanted")


def norm_of(config: TransformerConfig) -> LayerNorm | RMSNorm:
    """A norm of the model's kind and width."""
    kind = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}[config.norm]
    return kind(config.hidden_size, config.layer_norm_eps)


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x), through the library's linear."""
    return linear(x, layer.weight, layer.bias)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple:
    """Rotary positions of heads (T, H, D) with position_ids (T,), or (B, T, H, D) with (B, T)."""
    if q.dim() == 3:
        return rotary(q, k, cos, sin, position_ids=position_ids)
    turned = rotary(*(t.transpose(1, 2) for t in (q, k)), cos, sin, position_ids=position_ids)
    return tuple(t.transpose(1, 2) for t in turned)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh", "geglu": "none", "geglu_tanh": "tanh"}


def activate(x: Tensor, layer: nn.Linear, activation: str) -> Tensor:
    """activation(layer(x)); gelu adds the bias inside its pass instead of one of its own."""
    if activation == "relu":
        return F.relu(affine(layer, x))
    if activation == "swiglu":
        return swiglu(affine(layer, x))
    approximate = _APPROXIMATE[activation]
    if activation in GATED:
        return geglu(affine(layer, x), approximate=approximate)
    return gelu_of_product(x, layer.weight, layer.bias, approximate)


@torch.no_grad()
def initialise(model: nn.Module, std: float) -> None:
    """Weights and embeddings from N(0, std), as BERT; biases 0, and norms the identity."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(0.0, std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()


def initial(parameter: Tensor, name: str, std: float) -> Tensor:
    """`parameter`, filled as initialise() would fill the one of this name."""
    if name.endswith("bias"):
        return parameter.zero_()
    return parameter.normal_(0.0, std) if parameter.dim() > 1 else parameter.fill_(1.0)
