"""Whole blocks of transformers, for what lies between their layers: dropout, addition and norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels import nn
from slimkernels.integrations._hf_layers import RMSNorm, activated, is_theirs
from slimkernels.nn._parts import is_plain, product
from slimkernels.nn._torchs_own import is_small
from slimkernels.ops.add_layer_norm import add_layer_norm
from slimkernels.ops.add_rms_norm import add_rms_norm
from slimkernels.ops.bias_dropout_add import bias_dropout_add
from slimkernels.ops.embedding import embedding


class PostNormEncoderLayer:
    """BartEncoderLayer."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        branch, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
        x, _ = _add_norm(self, branch, hidden_states, self.self_attn_layer_norm)
        x, _ = _add_norm(self, _feed_forward(self, x), x, self.final_layer_norm)
        return clamped_where_overflown(x) if x.dtype == torch.float16 else x


class PostNormDecoderLayer:
    """BartDecoderLayer."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache=None,
        use_cache: bool | None = True,
        **kwargs,
    ) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        branch, _ = self.self_attn(
            hidden_states, cache=cache, attention_mask=attention_mask, **kwargs
        )
        x, _ = _add_norm(self, branch, hidden_states, self.self_attn_layer_norm)
        if encoder_hidden_states is not None:
            branch, _ = self.encoder_attn(
                x,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
            x, _ = _add_norm(self, branch, x, self.encoder_attn_layer_norm)
        return _add_norm(self, _feed_forward(self, x), x, self.final_layer_norm)[0]


class PreNormEncoderLayer:
    """PegasusEncoderLayer."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        x = self.self_attn_layer_norm(hidden_states)
        branch, _ = self.self_attn(hidden_states=x, attention_mask=attention_mask, **kwargs)
        x, total = _add_norm(self, branch, hidden_states, self.final_layer_norm)
        x = _add(self, _feed_forward(self, x), total)
        return _clamped(x) if x.dtype == torch.float16 else x


class PreNormDecoderLayer:
    """PegasusDecoderLayer."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache=None,
        use_cache: bool | None = True,
        **kwargs,
    ) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
        x = self.self_attn_layer_norm(hidden_states)
        branch, _ = self.self_attn(
            hidden_states=x, cache=cache, attention_mask=attention_mask, **kwargs
        )
        if encoder_hidden_states is not None:
            x, total = _add_norm(self, branch, hidden_states, self.encoder_attn_layer_norm)
            branch, _ = self.encoder_attn(
                hidden_states=x,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                cache=cache,
                **kwargs,
            )
            hidden_states = total
        x, total = _add_norm(self, branch, hidden_states, self.final_layer_norm)
        return _add(self, _feed_forward(self, x), total)


class LlamaDecoderLayer:
    """LlamaDecoderLayer: the first sum and the second norm in one pass."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        norm = self.post_attention_layernorm
        if is_theirs(hidden_states) or not _is_rms_norm(norm, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        x = self.input_layernorm(hidden_states)
        kwargs |= dict(zip(_LLAMA_ARGUMENTS, args, strict=False))
        branch, _ = self.self_attn(hidden_states=x, **{**_LLAMA_DEFAULTS, **kwargs})
        if branch.dtype != hidden_states.dtype:
            total = hidden_states + branch
            x = norm(total)
        else:
            x, total = add_rms_norm(
                *(branch, hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)
            )
        return total + self.mlp(x)


_LLAMA_ARGUMENTS = "attention_mask", "position_ids", "cache", "use_cache", "position_embeddings"
_LLAMA_DEFAULTS = dict.fromkeys(_LLAMA_ARGUMENTS) | {"use_cache": False}


class Embeddings:
    """BertEmbeddings: three tables, LayerNorm and dropout in one pass."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_length: int = 0,
    ) -> Tensor:
        words, positions = self.word_embeddings, self.position_embeddings
        segments, norm, dropout = self.token_type_embeddings, self.LayerNorm, self.dropout
        plain = all(_is_plain_table(t) for t in (words, positions, segments))
        plain = plain and is_plain(norm, nn.LayerNorm, torch.nn.LayerNorm)
        plain = plain and is_plain(dropout, nn.Dropout, torch.nn.Dropout)
        plain = plain and dropout.p < 1 and positions.padding_idx is segments.padding_idx is None
        if (
            input_ids is None
            or not plain
            or is_small(words.weight[:1].expand(input_ids.numel(), -1))
        ):
            return super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, cache_length
            )
        L = input_ids.shape[1]
        if position_ids is None:
            position_ids = self.position_ids[:, cache_length : L + cache_length]
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[:, :1].expand_as(position_ids)
        return embedding(
            input_ids,
            words.weight,
            words.padding_idx,
            position_ids=position_ids,
            position_weight=positions.weight,
            segment_ids=token_type_ids,
            segment_weight=segments.weight,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            eps=norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
        )


def _is_plain_table(table) -> bool:
    if not is_plain(table, torch.nn.Embedding):
        return False
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _is_rms_norm(norm, x) -> bool:
    """Whether `norm` is one of ours over LlamaRMSNorm, and its output has x's dtype."""
    if getattr(type(norm), "_slimkernels_class", None) is not RMSNorm or not is_plain(
        norm, type(norm)
    ):
        return False
    return norm.weight.dtype == x.dtype


def _add_norm(layer, branch: Tensor, residual: Tensor, norm) -> tuple[Tensor, Tensor]:
    """(norm(total), total) with total = residual + dropout(branch)."""
    p = layer.dropout if layer.training else 0.0
    if not is_plain(norm, nn.LayerNorm, torch.nn.LayerNorm):
        total = residual + F.dropout(branch, p)
        return norm(total), total
    return add_layer_norm(
        branch.to(residual.dtype),  # under autocast the sum is in residual's
        residual,
        norm.normalized_shape,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout_p=p,
    )


def _add(layer, branch: Tensor, residual: Tensor) -> Tensor:
    p = layer.dropout if layer.training else 0.0
    return bias_dropout_add(branch.to(residual.dtype), None, residual, p)


def _feed_forward(layer, x: Tensor) -> Tensor:
    x = activated(layer.fc1, layer.activation_fn, x)
    if layer.training and layer.activation_dropout > 0:
        x = bias_dropout_add(x, dropout_p=layer.activation_dropout)
    return product(layer.fc2, x)


def _clamped(x: Tensor) -> Tensor:
    limit = torch.finfo(x.dtype).max - 1000
    return x.clamp(-limit, limit)


def clamped_where_overflown(x: Tensor) -> Tensor:
    """_clamped(x) if an element is not finite, else x; the host does not wait to hear which."""
    return torch.where(torch.isfinite(x).all(), x, _clamped(x))
