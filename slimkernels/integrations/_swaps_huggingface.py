"""The swaps of transformers' modules: activations, layers by their code, and whole models."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch.nn import Module
from transformers import PreTrainedModel, activations

from slimkernels.integrations import _hf_blocks as blocks
from slimkernels.integrations import _hf_layers as layers
from slimkernels.integrations import _hf_unpad as unpad
from slimkernels.integrations._hf_logits import VocabularyLinear
from slimkernels.integrations._hf_twins import combined, fingerprint, is_twin
from slimkernels.integrations._swap import Swap, class_of, swap
from slimkernels.integrations.huggingface import NAME


def _is_gelu(module: Module) -> str | None:
    if module.act is torch.nn.functional.gelu:
        return None
    return "computes gelu from its formula, in the input's dtype, on purpose"


SWAPS = {
    swap.original: swap
    for swap in (
        Swap(activations.GELUActivation, layers.GELUActivation, _is_gelu),
        Swap(activations.NewGELUActivation, layers.NewGELUActivation),
        Swap(activations.FastGELUActivation, layers.FastGELUActivation),
        Swap(activations.GELUTanh, layers.GELUTanh),
        Swap(activations.SiLUActivation, layers.SiLUActivation),
        Swap(activations.ReLUSquaredActivation, layers.ReLUSquaredActivation),
    )
}

# Rows of all tables: (family, class), whose twins are meant, too, and the fingerprint of the code
# that was read. A version of transformers with other code is left until somebody has read that.

# What runs in place of the class.
_LAYERS = {
    ("llama", "LlamaRMSNorm"): ("abf7ee53", layers.RMSNorm),
    ("t5", "T5LayerNorm"): ("ad89ff01", layers.T5RMSNorm),
    ("gemma", "GemmaRMSNorm"): ("73fc07b1", layers.ZeroCenteredRMSNorm),
    ("bert", "BertSelfOutput"): ("1e9cb700", layers.SelfOutput),
    ("bert", "BertIntermediate"): ("25a66c54", layers.Intermediate),
    ("bert", "BertEmbeddings"): ("46d40f73", blocks.Embeddings),
    ("llama", "LlamaMLP"): ("d9c10cff", layers.GatedMLP),
    ("phi3", "Phi3MLP"): ("64f37bf4", layers.StackedGatedMLP),
    ("modernbert", "ModernBertMLP"): ("4223a507", layers.ModernBertMLP),
    ("t5", "T5DenseGatedActDense"): ("3f85efcc", layers.T5GatedMLP),
    ("bart", "BartEncoderLayer"): ("964bf902", blocks.PostNormEncoderLayer),
    ("bart", "BartDecoderLayer"): ("4e8277bc", blocks.PostNormDecoderLayer),
    ("pegasus", "PegasusEncoderLayer"): ("f4fa07ac", blocks.PreNormEncoderLayer),
    ("pegasus", "PegasusDecoderLayer"): ("8a217d82", blocks.PreNormDecoderLayer),
    ("llama", "LlamaDecoderLayer"): ("db3b479d", blocks.LlamaDecoderLayer),
}

# Layers that may run on packed tokens, what packs, and the path of their attention.
_PACKING = {
    ("bert", "BertLayer"): ("fcd08b57", unpad.Layer, "attention.self"),
    ("distilbert", "TransformerBlock"): ("4d3f3244", unpad.Layer, "attention"),
    ("albert", "AlbertLayer"): ("4555e0f9", unpad.Layer, "attention"),
    ("bart", "BartEncoderLayer"): ("964bf902", unpad.Layer, "self_attn"),
    ("pegasus", "PegasusEncoderLayer"): ("f4fa07ac", unpad.Layer, "self_attn"),
    ("t5", "T5Block"): ("7a3c07e0", unpad.BiasedLayer, "layer.0.SelfAttention"),
    ("modernbert", "ModernBertEncoderLayer"): ("bbbde64e", unpad.RotaryLayer, "attn"),
    ("gpt2", "GPT2Block"): ("15cd1242", unpad.GPT2Layer, "attn"),
    ("gpt_neox", "GPTNeoXLayer"): ("35c4c6e8", unpad.CausalRotaryLayer, "attention"),
    ("llama", "LlamaDecoderLayer"): ("db3b479d", unpad.CausalRotaryLayer, "self_attn"),
    ("gemma2", "Gemma2DecoderLayer"): ("854c6390", unpad.CausalRotaryLayer, "self_attn"),
    ("phi3", "Phi3DecoderLayer"): ("fc26505a", unpad.CausalRotaryLayer, "self_attn"),
}

# Attentions that look at no other tokens than transformers' interface does.
_ATTENTIONS = {
    ("bert", "BertSelfAttention"): ("e6b3fda6",),
    ("distilbert", "DistilBertSelfAttention"): ("2df1a4c3",),
    ("albert", "AlbertAttention"): ("72e9f2c1",),
    ("bart", "BartAttention"): ("1eea5cc1",),
    ("t5", "T5Attention"): ("5f57184d",),
    ("modernbert", "ModernBertAttention"): ("2c2e050d",),
    ("gpt2", "GPT2Attention"): ("c7cab06b",),
    ("gpt_neox", "GPTNeoXAttention"): ("4680943a",),
    ("llama", "LlamaAttention"): ("0bd9d2a6",),
    ("mistral", "MistralAttention"): ("2322a314",),
    ("qwen2", "Qwen2Attention"): ("cd8669a2",),
    ("qwen3", "Qwen3Attention"): ("5d4ecb3c",),
    ("gemma2", "Gemma2Attention"): ("45fbde1f",),
    ("gemma3", "Gemma3Attention"): ("79e2fdd4",),
    ("phi3", "Phi3Attention"): ("322f8cc5",),
}

# Stacks of such layers, and where in them these are.
_STACKS = {
    ("bert", "BertEncoder"): ("50ca87b0", "layer"),
    ("distilbert", "Transformer"): ("d95bdb4d", "layer"),
    ("albert", "AlbertTransformer"): ("5b2dbbeb", "albert_layer_groups"),
    ("bart", "BartEncoder"): ("259b5d6d", "layers"),
    ("marian", "MarianEncoder"): ("c0255967", "layers"),
    ("pegasus", "PegasusEncoder"): ("8a5609d3", "layers"),
    ("t5", "T5Stack"): ("bb5939d5", "block"),
    ("modernbert", "ModernBertModel"): ("f753aef8", "layers"),
    ("gpt2", "GPT2Model"): ("8c87503b", "h"),
    ("gpt_neox", "GPTNeoXModel"): ("3559a94a", "layers"),
    ("llama", "LlamaModel"): ("044b6972", "layers"),
    ("mistral", "MistralModel"): ("4fa8c406", "layers"),
    ("qwen2", "Qwen2Model"): ("b6da010c", "layers"),
    ("gemma2", "Gemma2Model"): ("99de7c4e", "layers"),
    ("gemma3", "Gemma3TextModel"): ("ad9e782b", "layers"),
}


def swap_for(module: Module) -> Swap | None:
    """The swap of a module that is known by its code, or by being a model."""
    cls = class_of(module)
    is_theirs = cls.__module__.startswith("transformers.")
    ours = _known(module) if is_theirs else ()
    if isinstance(module, PreTrainedModel):
        return _model(cls, ours or ((unpad.Head,) if _has_head(module) else ()))
    if ours:
        return Swap(cls, combined(ours, cls))
    is_newer = is_theirs and any(is_twin(cls, *of) for of in _LAYERS)
    return Swap(cls, None, _is_newer) if is_newer else None


def _known(module: Module) -> tuple[type, ...]:
    """What runs in place of a module of transformers, by its code."""
    if _is_stack(module):
        return (unpad.Stack,)
    row = _row(class_of(module), _LAYERS)
    parts = _packing(module), None if row is None else row[1]
    return tuple(part for part in parts if part is not None)


def _row(cls: type[Module], table: dict[tuple[str, str], tuple]) -> tuple | None:
    for of, row in table.items():
        if is_twin(cls, *of) and fingerprint(*of) == row[0]:
            return row
    return None


def _is_newer(module: Module) -> str:
    return f"transformers {transformers.__version__} computes it otherwise than what ours was for"


def _packing(module: Module) -> type | None:
    """What packs in a layer; None for what is no layer that may run on packed tokens."""
    row = _row(class_of(module), _PACKING)
    if row is None or getattr(module, "is_decoder", False) or hasattr(module, "crossattention"):
        return None  # an encoder's tokens are not those of the queries
    _, ours, path = row
    if any(getattr(m, "chunk_size_feed_forward", 0) for m in module.modules()):
        return None
    attention = class_of(module.get_submodule(path))
    return None if _row(attention, _ATTENTIONS) is None else ours


def _is_stack(module: Module) -> bool:
    row = _row(class_of(module), _STACKS)
    if row is None:
        return False
    inside = [m for m in getattr(module, row[1]).modules() if _row(class_of(m), _PACKING)]
    return bool(inside) and all(_packing(layer) is not None for layer in inside)


def _has_head(model: PreTrainedModel) -> bool:
    """Whether what it makes of its stacks' outputs may depend on those for padding."""
    is_seq2seq = getattr(model.config, "is_encoder_decoder", False)
    if is_seq2seq and "TokenClassification" not in type(model).__name__:
        return False  # labels are the decoder's
    takes_labels = "labels" in inspect.signature(type(model).forward).parameters
    if not (takes_labels or unpad.reads_any_token(model)):
        return False
    return any(isinstance(m, unpad.Stack) or _is_stack(m) for m in model.modules())


_VOCABULARY = Swap(torch.nn.Linear, VocabularyLinear)


def _model(cls: type[PreTrainedModel], ours: tuple[type, ...]) -> Swap:
    made = combined(ours, cls) if ours else None
    return Swap(cls, made, _model_refusal, _adapt, _undo, _model_says)


def _model_refusal(model: PreTrainedModel) -> str | None:
    return _attention_refusal(model) if _vocabulary(model) is None else None


def _model_says(model: PreTrainedModel) -> str:
    said = [_attention_refusal(model) or f"attn_implementation={NAME!r}"]
    if isinstance(model, unpad.Stack):
        said.append("padding is left out where nobody reads it")
    if isinstance(model, unpad.Head) and unpad.reads_any_token(model):
        said.append("padding stays, since the head reads it")
    if type(model.get_output_embeddings()) is VocabularyLinear:
        said.append("logits are computed when they are read")
    return "; ".join(said)


def _vocabulary(model: PreTrainedModel) -> Module | None:
    """The product with the vocabulary's matrix that makes the model's logits, if it may be lazy."""
    linear = model.get_output_embeddings()
    if type(linear) is not torch.nn.Linear or "forward" in vars(linear):
        return None
    hooks = linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks
    return None if any(hooks) or linear._backward_pre_hooks else linear


def _attention_refusal(model: PreTrainedModel) -> str | None:
    if getattr(model.config, "output_attentions", False):
        return "config.output_attentions asks for attention's weights, which ours never stores"
    if not model._can_set_attn_implementation():
        return "its attention does not ask transformers' interface, where ours is registered"
    if not (model._supports_sdpa or model._supports_attention_backend):
        return "its attention is its own: it does not take another"
    present = model.config._attn_implementation
    if present not in ("sdpa", "eager", NAME):
        return f"attn_implementation={present!r} was asked for, and stays"
    return None


def _adapt(model: PreTrainedModel) -> dict[str, str | None]:
    """Sets the attention, and what goes with being a model; returns the former attentions."""
    saved = {}
    if _attention_refusal(model) is None:
        present = {where: config._attn_implementation for where, config in _configs(model)}
        # A model inside another may have been set with it, and is set back with it.
        saved = {where: name for where, name in present.items() if name != NAME}
        model.set_attn_implementation(NAME)
    linear = _vocabulary(model)
    if linear is not None:
        swap(linear, _VOCABULARY)
    return saved


def _undo(model: PreTrainedModel, saved: dict[str, str | None]) -> None:
    for where, config in _configs(model):
        if where in saved:
            config._attn_implementation_internal = saved[where]


def _configs(model: PreTrainedModel):
    """(where, config) of the model, of those in it, and of their parts."""
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield from _with_parts(path, module.config)


def _with_parts(where, config):
    yield where, config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _with_parts(f"{where}:{name}", part)
