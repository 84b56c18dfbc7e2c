import json

import pytest

from slimkernels.models.config import PRESETS, TransformerConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_go_through_json(name):
    config = TransformerConfig.preset(name, dropout_p=0.2)
    assert config.dropout_p == 0.2
    assert config.head_size * config.num_heads == config.hidden_size
    assert TransformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_have_the_published_sizes():
    mini = TransformerConfig.preset("minilm")
    assert (mini.num_layers, mini.hidden_size, mini.num_heads) == (6, 384, 12)
    assert mini.intermediate_size == 1536
    assert TransformerConfig.preset("base") == TransformerConfig()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"hidden_size": 100}, "hidden_size must be a multiple of num_heads, 12; got 100"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1; got 0"),
        ({"vocab_size": 1.5}, "vocab_size must be an integer >= 1; got 1.5"),
        ({"num_layers": -1}, "num_layers must be an integer >= 0; got -1"),
        ({"num_layers": "2"}, "num_layers must be an integer >= 0; got '2'"),
        ({"dropout_p": 1.0}, r"dropout_p must be a number in \[0, 1\); got 1.0"),
        ({"attention_dropout_p": -0.1}, r"attention_dropout_p must be a number in .*; got -0.1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive number; got 0.0"),
        ({"initializer_std": True}, "initializer_std must be a positive number; got True"),
        ({"logit_scale": float("nan")}, "logit_scale must be a number; got nan"),
        ({"bias": "no"}, "bias must be True or False; got 'no'"),
        ({"rotary_stretch": (8.0, 1.0)}, r"rotary_stretch must be four numbers, .*\(8.0, 1.0\)"),
        ({"activation": "tanh"}, "activation must be gelu or .* or geglu_tanh; got 'tanh'"),
        ({"num_key_heads": 5}, "num_heads must be a multiple of num_key_heads, 5; got 12"),
        ({"positions": "sinus"}, "positions must be learned or rotary or relative; got 'sinus'"),
        ({"hidden": 4}, "a field must be one of vocab_size, .*; got 'hidden'"),
    ],
)
def test_bad_fields_are_one_sentence(fields, sentence):
    with pytest.raises(ValueError, match="^TransformerConfig: " + sentence):
        TransformerConfig.from_dict(fields)


def test_unknown_preset_is_one_sentence():
    with pytest.raises(ValueError, match="preset must be tiny or .* or large; got 'huge'"):
        TransformerConfig.preset("huge")
