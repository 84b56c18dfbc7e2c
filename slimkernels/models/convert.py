"""Weights and configs of Hugging Face's BertForPreTraining, to ours and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from slimkernels.models.config import TransformerConfig

# Theirs to ours, the names' beginnings; {layer} is the number of a block.
_PREFIXES = {
    "bert.embeddings.word_embeddings": "bert.embedding.token",
    "bert.embeddings.position_embeddings": "bert.embedding.position",
    "bert.embeddings.token_type_embeddings": "bert.embedding.segment",
    "bert.embeddings.LayerNorm": "bert.embedding.norm",
    "bert.pooler.dense": "pooler",
    "cls.seq_relationship": "next_sentence",
    "cls.predictions.transform.dense": "transform",
    "cls.predictions.transform.LayerNorm": "transform_norm",
}
_LAYER_PREFIXES = {
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}
_PROJECTIONS = ("query", "key", "value")
# Tied to another tensor, or a constant.
_REDUNDANT = re.compile(r"cls\.predictions\.decoder\.|bert\.embeddings\.(position|token_type)_ids")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hugging_face(config) -> TransformerConfig:
    """Ours for a transformers BertConfig, or for its dictionary.

    Errors  ValueError for an activation or a position embedding that is not implemented
    """
    theirs = config if isinstance(config, Mapping) else config.to_dict()
    if theirs["hidden_act"] not in _ACTIVATIONS:
        raise ValueError(
            f"config_from_hugging_face: hidden_act must be {' or '.join(_ACTIVATIONS)}; "
            f"got {theirs['hidden_act']!r}"
        )
    kind = theirs.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise ValueError(
            f"config_from_hugging_face: position_embedding_type must be 'absolute'; got {kind!r}"
        )
    return TransformerConfig(
        vocab_size=theirs["vocab_size"],
        hidden_size=theirs["hidden_size"],
        num_layers=theirs["num_hidden_layers"],
        num_heads=theirs["num_attention_heads"],
        intermediate_size=theirs["intermediate_size"],
        max_positions=theirs["max_position_embeddings"],
        type_vocab_size=theirs["type_vocab_size"],
        dropout_p=theirs["hidden_dropout_prob"],
        attention_dropout_p=theirs["attention_probs_dropout_prob"],
        layer_norm_eps=theirs["layer_norm_eps"],
        activation=_ACTIVATIONS[theirs["hidden_act"]],
        initializer_std=theirs["initializer_range"],
    )


def bert_from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict for our BertForPreTraining from one of Hugging Face's, query, key, value joined.

    The tied decoder matrix and constant buffers are dropped; gamma and beta, the norms' names in
    the first checkpoints, are read as weight and bias.
    Errors  ValueError for a name that BertForPreTraining does not have, or one that is missing
    """
    ours: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", name)
        name = re.sub("LayerNorm.beta$", "LayerNorm.bias", name)
        projection = re.fullmatch(
            r"bert\.encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(weight|bias)", name
        )
        if projection:
            layer, which, kind = projection.groups()
            parts.setdefault(f"bert.layers.{layer}.qkv.{kind}", {})[which] = tensor
        elif not _REDUNDANT.match(name):
            ours[_our_name(name)] = tensor
    for name, tensors in parts.items():
        for which in _PROJECTIONS:
            if which not in tensors:
                raise ValueError(f"bert_from_hugging_face: {which} of {name} is missing")
        ours[name] = torch.cat([tensors[which] for which in _PROJECTIONS])
    return ours


def bert_to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict for Hugging Face's BertForPreTraining from ours; the inverse, ties included."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        fused = re.fullmatch(r"bert\.layers\.(\d+)\.qkv\.(weight|bias)", name)
        if fused:
            layer, kind = fused.groups()
            for which, rows in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
                own = f"bert.encoder.layer.{layer}.attention.self.{which}.{kind}"
                theirs[own] = rows.clone()
        else:
            theirs[_their_name(name)] = tensor
    theirs["cls.predictions.decoder.weight"] = theirs["bert.embeddings.word_embeddings.weight"]
    theirs["cls.predictions.decoder.bias"] = theirs["cls.predictions.bias"]
    return theirs


def _our_name(name: str) -> str:
    if name == "cls.predictions.bias":
        return "decoder_bias"
    inner = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if inner and inner[2] in _LAYER_PREFIXES:
        return f"bert.layers.{inner[1]}.{_LAYER_PREFIXES[inner[2]]}.{inner[3]}"
    prefix, _, kind = name.rpartition(".")
    if prefix not in _PREFIXES:
        raise ValueError(f"bert_from_hugging_face: BertForPreTraining has no parameter {name}")
    return f"{_PREFIXES[prefix]}.{kind}"


def _their_name(name: str) -> str:
    if name == "decoder_bias":
        return "cls.predictions.bias"
    prefix, _, kind = name.rpartition(".")
    inner = re.fullmatch(r"bert\.layers\.(\d+)\.(.+)", prefix)
    for theirs, ours in (_LAYER_PREFIXES if inner else _PREFIXES).items():
        if inner and ours == inner[2]:
            return f"bert.encoder.layer.{inner[1]}.{theirs}.{kind}"
        if not inner and ours == prefix:
            return f"{theirs}.{kind}"
    raise ValueError(f"bert_to_hugging_face: our BertForPreTraining has no parameter {name}")
