"""Unpadded execution inside a padded model: its layers compute the real tokens alone.

A stack of layers (BertEncoder, LlamaModel) opens a scope; the first of its layers that runs packs
its hidden states (B, L, C) to (1, T, C), T tokens one sequence after the other; the stack's output
is unpacked, with zeros where padding was. Layers stay what they were, since all but attention looks
at one token at a time, and attention knows from the mask which tokens are together.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import Module

from slimkernels.integrations._hf_mask import (
    Packing,
    Pattern,
    is_readable,
    packing_of,
    pattern_of,
)
from slimkernels.integrations._hf_recording import recorded

# Below this share of padding, to pack and to unpack costs as much as is saved.
_WORTH_IT = 0.05
_IGNORED = -100  # transformers' label for what has no loss
# The second, which the loss then takes, are those of the next tokens.
_LABELS = "labels", "shift_labels"


class _Scope:
    """One run of a stack."""

    def __init__(self, stack: Module) -> None:
        self.stack = stack
        self.packing: Packing | None = None
        self.has_labels = _reads_padding.get() is False

    @functools.cached_property
    def is_seen(self) -> bool:
        return _is_seen(self.stack)  # once, since it takes a look at every module


_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("stack", default=None)
# Of the model with a head that runs: True, or False where labels for all tokens tell; None if none.
_reads_padding: contextvars.ContextVar[bool | None] = contextvars.ContextVar("head", default=None)


def _with(variable: contextvars.ContextVar, value, forward, args, kwargs):
    token = variable.set(value)
    try:
        return forward(*args, **kwargs)
    finally:
        variable.reset(token)


@functools.cache
def _names(cls: type[Module]) -> tuple[str, ...]:
    """The parameters of a class's forward; of one of ours, those of the class under it."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _by_name(module: Module, args: tuple, kwargs: dict) -> dict:
    return dict(zip(_names(type(module)), args, strict=False)) | kwargs


class Head:
    """Before a model with a head in its bases: tells its stacks whether the head reads padding.

    One that chooses among all tokens does (question answering) or takes the last (GPT-2's of two
    heads), and a loss with labels where the attention mask has padding, or that somebody else
    wrote for the model.
    """

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        given = _by_name(self, args, kwargs)
        mask, reads = given.get("attention_mask"), True if reads_any_token(self) else None
        if reads is None and _are_alike(given.get("labels"), mask):
            labels = [given.get(name) for name in _LABELS]
            at_padding = any(_has_loss_at_padding(each, mask) for each in labels)
            reads = at_padding or _has_a_loss_of_its_own(self)
        return _with(_reads_padding, reads, super().forward, args, kwargs)


def _are_alike(labels, mask) -> bool:
    """Whether there is a label for each token, and the host may look at them."""
    if not (isinstance(labels, Tensor) and isinstance(mask, Tensor)):
        return False
    return labels.dim() == 2 and labels.shape == mask.shape and is_readable(labels)


def _has_a_loss_of_its_own(model: Module) -> bool:
    """Whether `model.loss_function` was set, to a function that may look at all logits."""
    function = getattr(model, "_loss_function", None)
    where = getattr(function, "__module__", None) or ""
    return function is not None and not where.startswith("transformers.")


def _has_loss_at_padding(labels, mask) -> bool:
    if labels is None:
        return False
    if not _are_alike(labels, mask):
        return True
    return bool(((labels != _IGNORED) & (mask == 0).to(labels.device)).any())


def reads_any_token(model: Module) -> bool:
    """Whether a head chooses among all tokens, or takes the last of a row."""
    return any(kind in type(model).__name__ for kind in ("QuestionAnswering", "DoubleHeads"))


class Stack:
    """Before a stack of layers in its bases: what the stack returns is padded, whatever is inside.

    The padded path is taken under torch.compile, where padding is on the left or absent or less
    than a twentieth of the batch, where a sequence has no tokens, where hidden states or attentions
    are recorded, where a hook in the stack would see packed shapes (FSDP2's do not look), where a
    part is compiled, under activation checkpointing of the reentrant kind, and inside a Head that
    reads padding. A decoder takes it, too, where keys and values are cached, and where no Head has
    labels: who has none may read a token after the last.
    """

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or _reads_padding.get():
            return super().forward(*args, **kwargs)
        scope = _Scope(self)
        output = _with(_scope, scope, super().forward, args, kwargs)
        return output if scope.packing is None else _unpacked(output, scope.packing)


class Layer:
    """Before a layer in its bases: packs the hidden states that come padded into a scope."""

    _is_causal = False  # whether it may be one in which queries see no later keys

    def forward(self, hidden_states, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().forward(hidden_states, *args, **kwargs)
        given = _by_name(self, (hidden_states, *args), kwargs)
        packing = _begin(given, self._is_causal)
        if packing is not None:
            if hidden_states.shape[:2] == packing.shape:
                given["hidden_states"] = packing.pack(hidden_states)
            self._pack_arguments(packing, given)
        return super().forward(**given)

    def _pack_arguments(self, packing: Packing, given: dict) -> None:
        """Packs what else has a row for each token."""


class BiasedLayer(Layer):
    """A layer whose first has a bias over positions, which are counted in each sequence."""

    def _pack_arguments(self, packing, given):
        attention = self.layer[0].SelfAttention
        if given.get("position_bias") is None and attention.has_relative_attention_bias:
            L = packing.shape[1]
            bias = attention.compute_bias(L, L, device=packing.indices.device)
            given["position_bias"] = bias


class RotaryLayer(Layer):
    """A layer that is given the cosines and sines of its tokens' positions."""

    def _pack_arguments(self, packing, given):
        tables = given.get("position_embeddings")
        if tables is not None:
            given["position_embeddings"] = packing.tables(tables)


class CausalRotaryLayer(RotaryLayer):
    """LlamaDecoderLayer."""

    _is_causal = True


class GPT2Layer(Layer):
    """GPT2Block; the last one unpacks, since GPT2Model then asks for the padded shape."""

    _is_causal = True

    def forward(self, hidden_states, *args, **kwargs):
        output = super().forward(hidden_states, *args, **kwargs)
        if self.attn.layer_idx + 1 < self.attn.config.num_hidden_layers:
            return output
        packing = packing_of(_by_name(self, (hidden_states, *args), kwargs).get("attention_mask"))
        return _unpacked(output, packing)


# Where the hooks that fully_shard registers are defined.
_FSDP2 = "torch.distributed.fsdp._fully_shard._fsdp_state"
# Names of the cache of keys and values: the first is transformers' own, the last GPT-NeoX's.
_CACHES = "cache", "past_key_values", "layer_past"


def _begin(given: dict, is_causal: bool) -> Packing | None:
    """The packing of this forward pass; a new one if this is the first layer and it may begin."""
    mask, scope = given.get("attention_mask"), _scope.get()
    packing = packing_of(mask)
    if scope is None:  # a layer alone, or one that is computed again for backward
        return packing if torch._C._current_graph_task_id() != -1 else None
    pattern = pattern_of(mask)
    if pattern is None or pattern.lengths is None:
        return None
    (B, L, Lk), real = pattern.shape, sum(pattern.lengths)
    shape = tuple(given["hidden_states"].shape)
    if len(shape) != 3 or Lk != L:
        return None
    if scope.packing is None:
        if shape[:2] != (B, L) or not _may_begin(pattern, is_causal and scope.has_labels):
            return None
        if any(given.get(name) is not None for name in _CACHES) or scope.is_seen:
            return None
    elif shape[:2] != (1, real):
        return None
    # The mask may come from an earlier pass, whose packing is as good.
    packing = packing or Packing.begin(mask, pattern)
    scope.packing = scope.packing or packing
    return packing


def _may_begin(pattern: Pattern, is_causal: bool) -> bool:
    """Whether a mask is one of a layer's own tokens, and enough of it is padding."""
    (B, L, _), (left, right) = pattern.shape, pattern.window
    if pattern.offset != 0 or not (left == right or (is_causal and right == 0)):
        return False
    return min(pattern.lengths) > 0 and sum(pattern.lengths) <= (1 - _WORTH_IT) * B * L


def _is_seen(stack: Module) -> bool:
    """Whether something outside would see shapes inside `stack`, or must see its operations."""
    names = recorded()
    if names is None or names:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True  # packing is no function of torch.func
    if torch.nn.modules.module._has_any_global_hook():
        return True
    for module in stack.modules():
        # Ids are padded still: transformers hooks their table, so that checkpoints have a gradient.
        if isinstance(module, torch.nn.Embedding):
            continue
        hooks = (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *(module._backward_hooks or {}).values(),
            *(module._backward_pre_hooks or {}).values(),
        )
        if any(not _is_blind(hook, module, stack) for hook in hooks):
            return True
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return True  # compiled code neither packs nor knows of packing
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True  # it recomputes with a copy of the mask
    return False


def _is_blind(hook: Callable, module: Module, stack: Module) -> bool:
    """Whether a hook has no use for the shapes inside `stack`."""
    # transformers leaves its recorders in place, idle unless something is recorded.
    if getattr(hook, "__name__", "") == "output_capturing_hook":
        return True
    # FSDP2's gather and free parameters, and hand tensors on. Inside a layer that would be too late
    # for one that reads its parts' parameters before it runs them, as BiasedLayer does.
    is_whole = isinstance(module, Layer) or module is stack or module in stack.children()
    return is_whole and getattr(hook, "__module__", "") == _FSDP2


def _unpacked(output, packing: Packing | None):
    if isinstance(output, Tensor):
        if packing is None or output.shape[:2] != (1, len(packing.indices)):
            return output
        return packing.unpack(output)
    if isinstance(output, tuple):
        return _unpacked(output[0], packing), *output[1:]
    output.last_hidden_state = _unpacked(output.last_hidden_state, packing)
    return output
