"""Hugging Face's BERT: its names for our parameters, and its config."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert import (
    Family,
    Names,
    chosen,
    flag,
    given,
    name_of,
    require,
    table,
    taken,
    to_ours,
    to_theirs,
    without_ties,
)

_EMBEDDINGS = {
    "bert.embedding.token": "bert.embeddings.word_embeddings",
    "bert.embedding.position": "bert.embeddings.position_embeddings",
    "bert.embedding.segment": "bert.embeddings.token_type_embeddings",
}
_LAYER = "bert.encoder.layer.{}."
_SELF = _LAYER + "attention.self."
_LAYERS = {
    "bert.layers.{}.qkv": (_SELF + "query", _SELF + "key", _SELF + "value"),
    "bert.layers.{}.attention_output": _LAYER + "attention.output.dense",
    "bert.layers.{}.attention_norm": _LAYER + "attention.output.LayerNorm",
    "bert.layers.{}.intermediate": _LAYER + "intermediate.dense",
    "bert.layers.{}.output": _LAYER + "output.dense",
    "bert.layers.{}.output_norm": _LAYER + "output.LayerNorm",
}
_PRETRAINING = {
    "bert.embedding.norm": "bert.embeddings.LayerNorm",
    "pooler": "bert.pooler.dense",
    "next_sentence": "cls.seq_relationship",
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
}
_DECODER_BIAS = {"decoder_bias": "cls.predictions.bias"}
_HEADS = {"classifier": "classifier", "qa_outputs": "qa_outputs"}
_TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_CONSTANTS = ("embeddings.position_ids", "embeddings.token_type_ids")
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _names(config: TransformerConfig) -> Names:
    whole = _EMBEDDINGS | _PRETRAINING | _DECODER_BIAS | _HEADS
    return table(whole) | table(_LAYERS, config.num_layers)


def config_from_hugging_face(config) -> TransformerConfig:
    """Ours for a transformers BertConfig, or for its dictionary.

    Errors  ValueError for an activation or a position embedding that is not implemented, for a
            decoder, and for a vocabulary's matrix that is not tied to the token embedding
    """
    theirs = config if isinstance(config, Mapping) else config.to_dict()
    caller = "config_from_hugging_face"
    activation = chosen(caller, "hidden_act", theirs.get("hidden_act"), _ACTIVATIONS)
    require(caller, theirs, position_embedding_type="absolute", is_decoder=False)
    if not flag(caller, theirs, "tie_word_embeddings", True):
        raise ValueError(
            f"{caller}: tie_word_embeddings must be True, as our decoder's matrix "
            "is the token embedding; got False"
        )
    return TransformerConfig(activation=activation, **taken(caller, theirs, _FIELDS))


_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "dropout_p": "hidden_dropout_prob",
    "attention_dropout_p": "attention_probs_dropout_prob",
    "layer_norm_eps": "layer_norm_eps",
    "initializer_std": "initializer_range",
}


def config_to_hugging_face(config: TransformerConfig) -> dict[str, object]:
    """The entries of a BertConfig that our config has."""
    return given(config, _FIELDS) | {
        "hidden_act": name_of(config.activation, _ACTIVATIONS),
        "tie_word_embeddings": True,
    }


def today(name: str) -> str:
    """`name` as it is in checkpoints of today."""
    name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", name)
    return re.sub("LayerNorm.beta$", "LayerNorm.bias", name)


BERT = Family(
    model_type="bert",
    prefix="bert.",
    names=_names,
    from_theirs=config_from_hugging_face,
    to_theirs=config_to_hugging_face,
    ties=lambda config: _TIES,
    constants=_CONSTANTS,
    today=today,
)


def bert_from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict for our BertForPreTraining from one of Hugging Face's, query, key, value joined.

    Constant buffers and what is tied are dropped; gamma and beta, the norms' names in the first
    checkpoints, are read as weight and bias.
    Errors  ValueError for a name that BertForPreTraining does not have, or one that is missing,
            and for a decoder's weight or bias that differs from what ours is tied to
    """
    caller = "bert_from_hugging_face"
    state = {today(n): t for n, t in state.items() if not n.endswith(_CONSTANTS)}
    state = without_ties(state, _TIES, caller)
    blocks = (re.match(r"bert\.encoder\.layer\.(\d+)\.", name) for name in state)
    layers = table(_LAYERS, max((int(block[1]) + 1 for block in blocks if block), default=0))
    both = [*_PRETRAINING, *layers]
    wanted = [f"{module}.{kind}" for module in both for kind in ("weight", "bias")]
    wanted += [f"{module}.weight" for module in _EMBEDDINGS] + list(_DECODER_BIAS)
    names = table(_EMBEDDINGS | _PRETRAINING | _DECODER_BIAS) | layers
    ours, missing, unused = to_ours(state, names, wanted)
    for name in unused:
        raise ValueError(f"{caller}: BertForPreTraining has no parameter {name}")
    for absent in missing.values():
        raise ValueError(f"{caller}: {absent[0]} is missing")
    return ours


def bert_to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict for Hugging Face's BertForPreTraining from ours; the inverse, ties included."""
    blocks = (re.match(r"bert\.layers\.(\d+)\.", name) for name in state)
    count = max((int(block[1]) + 1 for block in blocks if block), default=0)
    theirs = to_theirs(state, _names(TransformerConfig(num_layers=count)))
    return theirs | {tied: theirs[first] for tied, first in _TIES.items() if first in theirs}
