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

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if is_theirs(hidden_states) or _FORMER_NAME in kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        own, cross = _attentions(args, kwargs)
        branch, _ = self.self_attn(hidden_states, **own)
        x, _ = _add_norm(self, branch, hidden_states, self.self_attn_layer_norm)
        if cross is not None:
            branch, _ = self.encoder_attn(x, **cross)
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

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if is_theirs(hidden_states) or _FORMER_NAME in kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        own, cross = _attentions(args, kwargs)
        total = hidden_states
        branch, _ = self.self_attn(hidden_states=self.self_attn_layer_norm(total), **own)
        if cross is not None:
            x, total = _add_norm(self, branch, total, self.encoder_attn_layer_norm)
            branch, _ = self.encoder_attn(hidden_states=x, **cross)
        x, total = _add_norm(self, branch, total, self.final_layer_norm)
        return _add(self, _feed_forward(self, x), total)


# The cache of keys and values under the name that it had, which transformers still takes for it;
# an attention that is given both believes the other.
_FORMER_NAME = "past_key_values"
_DECODER_ARGUMENTS = (
    *("attention_mask", "encoder_hidden_states", "encoder_attention_mask"),
    *("cache", "use_cache"),
)


def _attentions(args: tuple, kwargs: dict) -> tuple[dict, dict | None]:
    """What a decoder layer's arguments are to its two attentions; no second without an encoder."""
    given = {"cache": None, **dict(zip(_DECODER_ARGUMENTS, args, strict=False)), **kwargs}
    given.pop("use_cache", None)
    mask = given.pop("attention_mask", None)
    states = given.pop("encoder_hidden_states", None)
    states_mask = given.pop("encoder_attention_mask", None)
    own = {**given, "attention_mask": mask}
    if states is None:
        return own, None
    return own, {**given, "attention_mask": states_mask, "key_value_states": states}


class LlamaDecoderLayer:
    """LlamaDecoderLayer: the first sum and the second norm in one pass."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        norm = self.post_attention_layernorm
        if is_theirs(hidden_states) or _FORMER_NAME in kwargs:
            return super().forward(hidden_states, *args, **kwargs)
        if not _is_rms_norm(norm, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        x = self.input_layernorm(hidden_states)
        given = {**_LLAMA_DEFAULTS, **dict(zip(_LLAMA_ARGUMENTS, args, strict=False)), **kwargs}
        branch, _ = self.self_attn(hidden_states=x, **given)
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
        if (
            input_ids is None
            or inputs_embeds is not None  # which transformers then takes
            or not _are_plain(words, positions, segments, norm, dropout)
            or is_small(words.weight[:1].expand(input_ids.numel(), -1))
        ):
            return super().forward(
                input_ids, token_type_ids, position_ids, inputs_embeds, cache_length
            )
        if position_ids is None:
            position_ids = self.position_ids[:, cache_length : input_ids.shape[1] + cache_length]
        if token_type_ids is None:
            token_type_ids = self.token_type_ids[:, :1].expand_as(position_ids)
        return embedding(
            *(input_ids, words.weight, words.padding_idx),
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


def _are_plain(words, positions, segments, norm, dropout) -> bool:
    """Whether Embeddings' parts are no more than what the op does."""
    if not all(_is_plain_table(table) for table in (words, positions, segments)):
        return False
    if positions.padding_idx is not None or segments.padding_idx is not None:
        return False
    if not is_plain(norm, nn.LayerNorm, torch.nn.LayerNorm):
        return False
    return is_plain(dropout, nn.Dropout, torch.nn.Dropout) and dropout.p < 1


def _is_plain_table(table) -> bool:
    if not is_plain(table, torch.nn.Embedding):
        return False
    if type(table.weight) not in (torch.nn.Parameter, Tensor):  # quantised or sharded
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
