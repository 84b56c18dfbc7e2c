"""Hugging Face's GPT-2 and Llama: their names for our parameters, and their configs."""

from __future__ import annotations

from collections.abc import Mapping

from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert import (
    Family,
    Names,
    check_entry,
    chosen,
    entry,
    flag,
    given,
    name_of,
    norm_chain,
    require,
    table,
    taken,
    tied,
)

_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_positions": "n_positions",
    "dropout_p": "resid_pdrop",
    "attention_dropout_p": "attn_pdrop",
    "layer_norm_eps": "layer_norm_epsilon",
    "initializer_std": "initializer_range",
}
_GPT2_LAYERS = {  # of Conv1D, whose matrices are transposed
    "decoder.layers.{}.qkv": "transformer.h.{}.attn.c_attn",
    "decoder.layers.{}.attention_output": "transformer.h.{}.attn.c_proj",
    "decoder.layers.{}.intermediate": "transformer.h.{}.mlp.c_fc",
    "decoder.layers.{}.output": "transformer.h.{}.mlp.c_proj",
}


def _gpt2_names(config: TransformerConfig) -> Names:
    count = config.num_layers
    linear = table(_GPT2_LAYERS, count)
    names = {ours: source._replace(transposed=True) for ours, source in linear.items()}
    names |= table({"decoder.layers.{}.attention_norm": "transformer.h.{}.ln_2"}, count)
    names |= table(
        {
            "decoder.embedding.token": "transformer.wte",
            "decoder.embedding.position": "transformer.wpe",
            "vocabulary.matrix": "lm_head",
        }
    )
    return names | norm_chain("decoder", count, "transformer.h.{}.ln_1", "transformer.ln_f")


def _gpt2_config(theirs: Mapping) -> TransformerConfig:
    caller = "config of GPT-2"
    require(
        *(caller, theirs),
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    fields = taken(caller, theirs, _GPT2_FIELDS)
    require(caller, theirs, embd_pdrop=fields["dropout_p"])
    activation = theirs.get("activation_function", "gelu_new")
    return TransformerConfig(
        type_vocab_size=0,
        norm_first=True,
        intermediate_size=entry(
            *(caller, theirs, "n_inner", "intermediate_size"), 4 * fields["hidden_size"]
        ),
        activation=chosen(caller, "activation_function", activation, _GPT2_ACTIVATIONS),
        tie_embeddings=flag(caller, theirs, "tie_word_embeddings", True),
        **fields,
    )


def _gpt2_entries(config: TransformerConfig) -> dict:
    return given(config, _GPT2_FIELDS) | {
        "n_inner": config.intermediate_size,
        "embd_pdrop": config.dropout_p,
        "activation_function": name_of(config.activation, _GPT2_ACTIVATIONS),
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT2 = Family(
    model_type="gpt2",
    prefix="transformer.",
    names=_gpt2_names,
    from_theirs=_gpt2_config,
    to_theirs=_gpt2_entries,
    ties=lambda config: tied(config, "lm_head.weight", "transformer.wte.weight"),
    constants=(".attn.bias", ".attn.masked_bias"),
    untied="lm_head.weight",
)

_LLAMA_ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh"}
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "rms_norm_eps",
}


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _llama_names(config: TransformerConfig) -> Names:
    count, layer = config.num_layers, "model.layers.{}."
    attention = tuple(f"{layer}self_attn.{which}_proj" for which in "qkv")
    names = table(
        {
            "decoder.layers.{}.qkv": attention,
            "decoder.layers.{}.attention_output": layer + "self_attn.o_proj",
            "decoder.layers.{}.attention_norm": layer + "post_attention_layernorm",
            "decoder.layers.{}.intermediate": (layer + "mlp.gate_proj", layer + "mlp.up_proj"),
            "decoder.layers.{}.output": layer + "mlp.down_proj",
        },
        count,
    )
    for ours, source in names.items():
        if ours.endswith("qkv"):
            names[ours] = source._replace(rows=config.qkv_widths)
    names |= table(
        {"decoder.embedding.token": "model.embed_tokens", "vocabulary.matrix": "lm_head"}
    )
    return names | norm_chain("decoder", count, layer + "input_layernorm", "model.norm")


def _llama_config(theirs: Mapping) -> TransformerConfig:
    caller = "config of Llama"
    bias = flag(caller, theirs, "attention_bias", False)
    require(caller, theirs, mlp_bias=bias)
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{caller}: rope_parameters must be an object; got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{caller}: rope_type must be 'default' or 'llama3'; got {kind!r}")
    stretch = tuple(rope.get(name) for name in _LLAMA3) if kind == "llama3" else None
    check_entry(caller, f"rope_parameters' {', '.join(_LLAMA3)}", "rotary_stretch", stretch)
    theta = entry(caller, {**theirs, **rope}, "rope_theta", "rotary_base", 10000.0)
    return TransformerConfig(
        type_vocab_size=0,
        dropout_p=0.0,
        attention_dropout_p=entry(
            *(caller, theirs, "attention_dropout", "attention_dropout_p"), 0.0
        ),
        norm_first=True,
        norm="rms_norm",
        bias=bias,
        positions="rotary",
        rotary_base=theta,
        rotary_stretch=stretch,
        num_key_heads=entry(caller, theirs, "num_key_value_heads", "num_key_heads", None),
        head_width=entry(caller, theirs, "head_dim", "head_width", None),
        activation=chosen(caller, "hidden_act", theirs.get("hidden_act"), _LLAMA_ACTIVATIONS),
        tie_embeddings=flag(caller, theirs, "tie_word_embeddings", False),
        initializer_std=entry(caller, theirs, "initializer_range", "initializer_std", 0.02),
        **taken(caller, theirs, _LLAMA_FIELDS),
    )


def _llama_entries(config: TransformerConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rotary_stretch is not None:
        stretch = zip(_LLAMA3, config.rotary_stretch, strict=True)
        rope |= {"rope_type": "llama3", **dict(stretch)}
    return given(config, _LLAMA_FIELDS) | {
        "attention_dropout": config.attention_dropout_p,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "rope_parameters": rope,
        # Where versions before 5 look for them.
        "rope_theta": config.rotary_base,
        "rope_scaling": None if config.rotary_stretch is None else rope,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "hidden_act": name_of(config.activation, _LLAMA_ACTIVATIONS),
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_std,
    }


LLAMA = Family(
    model_type="llama",
    prefix="model.",
    names=_llama_names,
    from_theirs=_llama_config,
    to_theirs=_llama_entries,
    ties=lambda config: tied(config, "lm_head.weight", "model.embed_tokens.weight"),
    constants=("rotary_emb.inv_freq",),
    untied="lm_head.weight",
)
