"""The swaps of transformers' modules: activations, layers by their code, and whole models."""

from __future__ import annotations

from operator import attrgetter

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

# (family, class): what runs in place of the class and its twins, and the fingerprints of the code
# that it was written for. A version of transformers with other code is left until somebody has read
# that.
_LAYERS = {
    ("llama", "LlamaRMSNorm"): (layers.RMSNorm, "abf7ee53"),
    ("t5", "T5LayerNorm"): (layers.T5RMSNorm, "ad89ff01"),
    ("gemma", "GemmaRMSNorm"): (layers.ZeroCenteredRMSNorm, "73fc07b1"),
    ("bert", "BertSelfOutput"): (layers.SelfOutput, "1e9cb700"),
    ("bert", "BertIntermediate"): (layers.Intermediate, "25a66c54"),
    ("bert", "BertEmbeddings"): (blocks.Embeddings, "46d40f73"),
    ("llama", "LlamaMLP"): (layers.GatedMLP, "d9c10cff"),
    ("phi3", "Phi3MLP"): (layers.StackedGatedMLP, "64f37bf4"),
    ("modernbert", "ModernBertMLP"): (layers.ModernBertMLP, "4223a507"),
    ("t5", "T5DenseGatedActDense"): (layers.T5GatedMLP, "3f85efcc"),
    ("bart", "BartEncoderLayer"): (blocks.PostNormEncoderLayer, "964bf902"),
    ("bart", "BartDecoderLayer"): (blocks.PostNormDecoderLayer, "4e8277bc"),
    ("pegasus", "PegasusEncoderLayer"): (blocks.PreNormEncoderLayer, "f4fa07ac"),
    ("pegasus", "PegasusDecoderLayer"): (blocks.PreNormDecoderLayer, "8a217d82"),
    ("llama", "LlamaDecoderLayer"): (blocks.LlamaDecoderLayer, "db3b479d"),
}

# Layers that may run on packed tokens: (family, class), what packs, and the attention in it, which
# must be the one that asks transformers' interface.
_PACKING = {
    ("bert", "BertLayer"): (unpad.Layer, "attention.self", "BertSelfAttention"),
    ("distilbert", "TransformerBlock"): (unpad.Layer, "attention", "DistilBertSelfAttention"),
    ("albert", "AlbertLayer"): (unpad.Layer, "attention", "AlbertAttention"),
    ("bart", "BartEncoderLayer"): (unpad.Layer, "self_attn", "BartAttention"),
    ("pegasus", "PegasusEncoderLayer"): (unpad.Layer, "self_attn", "PegasusAttention"),
    ("t5", "T5Block"): (unpad.BiasedLayer, "layer.0.SelfAttention", "T5Attention"),
    ("modernbert", "ModernBertEncoderLayer"): (unpad.RotaryLayer, "attn", "ModernBertAttention"),
}

# Stacks of such layers, and where in them these are.
_STACKS = {
    ("bert", "BertEncoder"): "layer",
    ("distilbert", "Transformer"): "layer",
    ("albert", "AlbertTransformer"): "albert_layer_groups",
    ("bart", "BartEncoder"): "layers",
    ("marian", "MarianEncoder"): "layers",
    ("pegasus", "PegasusEncoder"): "layers",
    ("t5", "T5Stack"): "block",
    ("modernbert", "ModernBertModel"): "layers",
}


def swap_for(module: Module) -> Swap | None:
    """The swap of a module that is known by its code, or by being a model."""
    cls = class_of(module)
    if not cls.__module__.startswith("transformers."):
        return _model(cls) if isinstance(module, PreTrainedModel) else None
    ours = tuple(part for part in (_packing(module), _layer(cls)) if part is not None)
    if _is_stack(module):
        ours = (unpad.Stack,)
    if isinstance(module, PreTrainedModel):
        return _model(cls, combined(ours, cls) if ours else None)
    if ours:
        return Swap(cls, combined(ours, cls))
    known = [of for of in _LAYERS if is_twin(cls, *of)]
    return Swap(cls, None, _is_newer) if known else None


def _layer(cls: type[Module]) -> type | None:
    for of, (ours, written_for) in _LAYERS.items():
        if is_twin(cls, *of) and fingerprint(*of) == written_for:
            return ours
    return None


def _is_newer(module: Module) -> str:
    return f"transformers {transformers.__version__} computes it otherwise than what ours was for"


def _packing(module: Module) -> type | None:
    """What packs in a layer; None for what is no layer that may run on packed tokens."""
    cls = class_of(module)
    for (family, name), (ours, path, attention) in _PACKING.items():
        if is_twin(cls, family, name):
            inner = attrgetter(path)(module) if "." not in path else module.get_submodule(path)
            is_known = is_twin(class_of(inner), family, attention)
            chunked = any(getattr(m, "chunk_size_feed_forward", 0) for m in module.modules())
            return ours if is_known and not chunked else None
    return None


def _is_stack(module: Module) -> bool:
    cls = class_of(module)
    for of, path in _STACKS.items():
        if is_twin(cls, *of):
            inside = [m for m in getattr(module, path).modules() if _is_layer(class_of(m))]
            return bool(inside) and all(_packing(layer) is not None for layer in inside)
    return False


def _is_layer(cls: type) -> bool:
    return any(is_twin(cls, *of) for of in _PACKING)


_VOCABULARY = Swap(torch.nn.Linear, VocabularyLinear)


def _model(cls: type[PreTrainedModel], ours: type | None = None) -> Swap:
    return Swap(cls, ours, _model_refusal, _adapt, _undo, _model_says)


def _model_refusal(model: PreTrainedModel) -> str | None:
    return _attention_refusal(model) if _vocabulary(model) is None else None


def _model_says(model: PreTrainedModel) -> str:
    said = [_attention_refusal(model) or f"attn_implementation={NAME!r}"]
    if isinstance(model, unpad.Stack):
        said.append("padding is left out")
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
    if _reads_padding(model):
        for module in model.modules():
            if _is_stack(module):
                unpad.keep_padded(module)
    return saved


def _undo(model: PreTrainedModel, saved: dict[str, str | None]) -> None:
    for where, config in _configs(model):
        if where in saved:
            config._attn_implementation_internal = saved[where]
    if _reads_padding(model):
        for module in model.modules():
            unpad.keep_padded(module, False)


def _reads_padding(model: PreTrainedModel) -> bool:
    """Whether a head looks at all tokens, padding too: one that chooses among them does."""
    return "QuestionAnswering" in type(model).__name__


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
