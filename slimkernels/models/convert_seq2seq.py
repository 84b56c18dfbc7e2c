"""Hugging Face's T5 and BART: their names for our parameters, and their configs."""

from __future__ import annotations

import math
from collections.abc import Mapping

from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert import (
    Family,
    Names,
    chosen,
    entry,
    flag,
    given,
    name_of,
    norm_chain,
    require,
    table,
    taken,
)


def _ties(config: TransformerConfig, prefix: str) -> dict[str, str]:
    """Both stacks have the shared table, and so has the vocabulary where the config says so."""
    seconds = [f"{prefix}{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    seconds += ["lm_head.weight"] if config.tie_embeddings else []
    return dict.fromkeys(seconds, f"{prefix}shared.weight")


_T5_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gated-gelu": "geglu_tanh",  # their name of the exact one in a gate means gelu_new
    "gated-silu": "swiglu",
}
_T5_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_width": "d_kv",
    "intermediate_size": "d_ff",
    "relative_buckets": "relative_attention_num_buckets",
    "dropout_p": "dropout_rate",
    "layer_norm_eps": "layer_norm_epsilon",
}
_T5_LONGEST = 512


def _t5_names(config: TransformerConfig) -> Names:
    names = table(
        {
            "encoder.embedding.token": "shared",
            "decoder.embedding.token": "shared",
            "vocabulary.matrix": "lm_head",
        }
    )
    for stack, count, last in (
        ("encoder", config.num_layers, 1),
        ("decoder", config.num_decoder_layers, 2),
    ):
        block, ours = f"{stack}.block.{{}}.layer.", f"{stack}.layers.{{}}."
        first, feed = f"{block}0.SelfAttention.", f"{block}{last}.DenseReluDense."
        gates = (feed + "wi_0", feed + "wi_1")
        names |= table(
            {
                ours + "qkv": tuple(first + which for which in "qkv"),
                ours + "attention_output": first + "o",
                ours + "attention_norm": block + "1.layer_norm",
                ours + "intermediate": gates if config.is_gated else feed + "wi",
                ours + "output": feed + "wo",
            },
            count,
        )
        names |= norm_chain(stack, count, block + "0.layer_norm", f"{stack}.final_layer_norm")
        names |= table({f"{stack}.relative": first.format(0) + "relative_attention_bias"})
    return names | table(
        {
            "decoder.layers.{}.memory_query": "decoder.block.{}.layer.1.EncDecAttention.q",
            "decoder.layers.{}.memory_key_value": tuple(
                f"decoder.block.{{}}.layer.1.EncDecAttention.{which}" for which in "kv"
            ),
            "decoder.layers.{}.memory_output": "decoder.block.{}.layer.1.EncDecAttention.o",
            "decoder.layers.{}.memory_norm": "decoder.block.{}.layer.2.layer_norm",
        },
        config.num_decoder_layers,
    )


def _t5_config(theirs: Mapping) -> TransformerConfig:
    caller = "config of T5"
    fields = taken(caller, theirs, _T5_FIELDS)
    kind = theirs.get("feed_forward_proj", "relu")
    is_tied = flag(caller, theirs, "tie_word_embeddings", True)
    # Version 5 always says tied, and has an entry of its own for what that used to decide.
    is_scaled = flag(caller, theirs, "scale_decoder_outputs", is_tied)
    farthest = "relative_attention_max_distance", "relative_max_distance"
    layers = "num_decoder_layers"  # is the entry's name and ours
    p = fields["dropout_p"]
    return TransformerConfig(
        type_vocab_size=0,
        max_positions=entry(caller, theirs, "n_positions", "max_positions", _T5_LONGEST),
        relative_max_distance=entry(caller, theirs, *farthest, 128),
        attention_dropout_p=p,
        activation_dropout_p=p,
        output_dropout_p=p,
        norm_first=True,
        norm="rms_norm",
        bias=False,
        positions="relative",
        attention_scale=1.0,
        activation=chosen(caller, "feed_forward_proj", kind, _T5_ACTIVATIONS),
        logit_scale=fields["hidden_size"] ** -0.5 if is_scaled else 1.0,
        tie_embeddings=is_tied,
        num_decoder_layers=entry(caller, theirs, layers, layers, fields["num_layers"]),
        **fields,
    )


def _t5_entries(config: TransformerConfig) -> dict:
    # The longest input is no limit of the model's, and a T5Config has no entry for it of its own.
    limit = {} if config.max_positions == _T5_LONGEST else {"n_positions": config.max_positions}
    return (
        given(config, _T5_FIELDS)
        | limit
        | {
            "relative_attention_max_distance": config.relative_max_distance,
            "feed_forward_proj": name_of(config.activation, _T5_ACTIVATIONS),
            "tie_word_embeddings": config.tie_embeddings,
            "scale_decoder_outputs": config.logit_scale != 1.0,
            "num_decoder_layers": config.num_decoder_layers,
            "is_encoder_decoder": True,
        }
    )


# Of the published models.
_T5_TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
T5 = Family(
    model_type="t5",
    prefix="",
    names=_t5_names,
    from_theirs=_t5_config,
    to_theirs=_t5_entries,
    ties=lambda config: _ties(config, ""),
    defaults=_T5_TOKENS,
    # The first checkpoints have a table of distances that no model reads.
    constants=("EncDecAttention.relative_attention_bias.weight",),
    untied="lm_head.weight",
)

_BART_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
_BART_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_heads": "encoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "max_positions": "max_position_embeddings",
    "dropout_p": "dropout",
    "attention_dropout_p": "attention_dropout",
    "activation_dropout_p": "activation_dropout",
    "initializer_std": "init_std",
}
_BART_POSITION_OFFSET = 2


def _bart_names(config: TransformerConfig) -> Names:
    names = table(
        {
            "encoder.embedding.token": "model.shared",
            "decoder.embedding.token": "model.shared",
            "vocabulary.matrix": "lm_head",
            "vocabulary.bias": "final_logits_bias",
        }
    )
    for stack, count in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        layer, ours = f"model.{stack}.layers.{{}}.", f"{stack}.layers.{{}}."
        names |= table(
            {
                f"{stack}.embedding.position": f"model.{stack}.embed_positions",
                f"{stack}.embedding.norm": f"model.{stack}.layernorm_embedding",
            }
        )
        names |= table(
            {
                ours + "qkv": tuple(f"{layer}self_attn.{which}_proj" for which in "qkv"),
                ours + "attention_output": layer + "self_attn.out_proj",
                ours + "attention_norm": layer + "self_attn_layer_norm",
                ours + "memory_query": layer + "encoder_attn.q_proj",
                ours + "memory_key_value": tuple(
                    f"{layer}encoder_attn.{which}_proj" for which in "kv"
                ),
                ours + "memory_output": layer + "encoder_attn.out_proj",
                ours + "memory_norm": layer + "encoder_attn_layer_norm",
                ours + "intermediate": layer + "fc1",
                ours + "output": layer + "fc2",
                ours + "output_norm": layer + "final_layer_norm",
            },
            count,
        )
    return names


def _bart_config(theirs: Mapping) -> TransformerConfig:
    caller = "config of BART"
    fields = taken(caller, theirs, _BART_FIELDS)
    require(
        *(caller, theirs),
        decoder_attention_heads=fields["num_heads"],
        decoder_ffn_dim=fields["intermediate_size"],
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        normalize_before=False,
        normalize_embedding=True,
        add_final_layer_norm=False,
    )
    activation = theirs.get("activation_function", "gelu")
    is_scaled = flag(caller, theirs, "scale_embedding", False)
    return TransformerConfig(
        type_vocab_size=0,
        layer_norm_eps=1e-5,
        activation=chosen(caller, "activation_function", activation, _BART_ACTIVATIONS),
        position_offset=_BART_POSITION_OFFSET,
        embedding_scale=math.sqrt(fields["hidden_size"]) if is_scaled else 1.0,
        tie_embeddings=flag(caller, theirs, "tie_word_embeddings", True),
        **fields,
    )


def _bart_entries(config: TransformerConfig) -> dict:
    return given(config, _BART_FIELDS) | {
        "decoder_attention_heads": config.num_heads,
        "decoder_ffn_dim": config.intermediate_size,
        "activation_function": name_of(config.activation, _BART_ACTIVATIONS),
        "scale_embedding": config.embedding_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "is_encoder_decoder": True,
    }


_BART_TOKENS = {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
BART = Family(
    model_type="bart",
    prefix="model.",
    names=_bart_names,
    from_theirs=_bart_config,
    to_theirs=_bart_entries,
    ties=lambda config: _ties(config, "model."),
    defaults=_BART_TOKENS,
    untied="lm_head.weight",
)
