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
_TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_CONSTANTS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hugging_face(config) -> TransformerConfig:
    """Ours for a transformers BertConfig, or for its dictionary.

    Errors  ValueError for an activation or a position embedding that is not implemented, and for
            a decoder that is not tied to the token embedding
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
    if not theirs.get("tie_word_embeddings", True):
        raise ValueError(
            "config_from_hugging_face: tie_word_embeddings must be True, as our decoder's matrix "
            "is the token embedding; got False"
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

    Constant buffers and what is tied are dropped; gamma and beta, the norms' names in the first
    checkpoints, are read as weight and bias.
    Errors  ValueError for a name that BertForPreTraining does not have, or one that is missing,
            and for a decoder's weight or bias that differs from what ours is tied to
    """
    state = {_today(name): tensor for name, tensor in state.items() if name not in _CONSTANTS}
    tied = {name: state.pop(name) for name in _TIES if name in state}
    _check_names(state)
    for name, tensor in tied.items():
        if not torch.equal(tensor, state[_TIES[name]]):
            raise ValueError(
                f"bert_from_hugging_face: {name} must equal {_TIES[name]}, to which ours is tied; "
                f"it differs"
            )
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        query = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.attention\.self\.query\.(.+)", name)
        if query:
            rows = [state[name.replace("query", which)] for which in _PROJECTIONS]
            ours[f"bert.layers.{query[1]}.qkv.{query[2]}"] = torch.cat(rows)
        elif ".attention.self." not in name:
            ours[_our_name(name)] = tensor
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


def _today(name: str) -> str:
    """`name` as it is in checkpoints of today."""
    name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", name)
    return re.sub("LayerNorm.beta$", "LayerNorm.bias", name)


def _check_names(state: Mapping[str, Tensor]) -> None:
    """All names of their BertForPreTraining and no other; the highest block's number counts."""
    blocks = (re.match(r"bert\.encoder\.layer\.(\d+)\.", name) for name in state)
    count = max((int(block[1]) + 1 for block in blocks if block), default=0)
    modules = list(_PREFIXES)
    for layer in range(count):
        parts = (*_LAYER_PREFIXES, *(f"attention.self.{which}" for which in _PROJECTIONS))
        modules += [f"bert.encoder.layer.{layer}.{part}" for part in parts]
    expected = {f"{module}.weight" for module in modules} | {"cls.predictions.bias"}
    expected |= {f"{module}.bias" for module in modules if not module.endswith("_embeddings")}
    for name in state:
        if name not in expected:
            raise ValueError(f"bert_from_hugging_face: BertForPreTraining has no parameter {name}")
    for name in sorted(expected - state.keys()):
        raise ValueError(f"bert_from_hugging_face: {name} is missing")


def _our_name(name: str) -> str:
    if name == "cls.predictions.bias":
        return "decoder_bias"
    prefix, _, kind = name.rpartition(".")
    inner = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)", prefix)
    if inner:
        return f"bert.layers.{inner[1]}.{_LAYER_PREFIXES[inner[2]]}.{kind}"
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
