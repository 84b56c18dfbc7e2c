"""Unpadded execution inside a padded encoder: its layers compute the real tokens alone.

A stack of layers (BertEncoder, T5Stack) opens a scope; the first of its layers that runs packs its
hidden states (B, L, C) to (1, T, C), T tokens one sequence after the other; the stack's output is
unpacked, with zeros where padding was. Layers stay what they were, since all but attention looks
at one token at a time, and attention knows from the mask which tokens are together.
"""

from __future__ import annotations

import contextvars

import torch
from torch import Tensor
from torch.nn import Module

from slimkernels.integrations._hf_mask import Packing, packing_of, pattern_of

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # without it nobody knows whether hidden states are asked for
    _active_collector = None

# Below this share of padding, to pack and to unpack costs as much as is saved.
_WORTH_IT = 0.05


_PADDED = "_slimkernels_keep_padded"


def keep_padded(stack: Module, wanted: bool = True) -> None:
    """Whether `stack` must compute the padding, too, because a head reads it."""
    vars(stack).pop(_PADDED, None)
    if wanted:
        vars(stack)[_PADDED] = True


class _Scope:
    def __init__(self, stack: Module) -> None:
        self.stack = stack
        self.packing: Packing | None = None


_scope: contextvars.ContextVar[_Scope | None] = contextvars.ContextVar("stack", default=None)


class Stack:
    """Before a stack of layers in its bases: what the stack returns is padded, whatever is inside.

    The padded path is taken under torch.compile, where padding is on the left or absent or less
    than a twentieth of the batch, where a sequence has no tokens, where hidden states or attentions
    are recorded, where a hook in the stack would see packed shapes, where a part is compiled, under
    activation checkpointing of the reentrant kind, and where the head chooses among all tokens
    (question answering).
    """

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling() or _PADDED in vars(self):
            return super().forward(*args, **kwargs)
        scope = _Scope(self)
        token = _scope.set(scope)
        try:
            output = super().forward(*args, **kwargs)
        finally:
            _scope.reset(token)
        return output if scope.packing is None else _unpacked(output, scope.packing)


class Layer:
    """Before a layer in its bases: packs the hidden states that come padded into a scope."""

    def forward(self, hidden_states, attention_mask=None, *args, **kwargs):
        packing = None if torch.compiler.is_compiling() else _begin(hidden_states, attention_mask)
        if packing is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if hidden_states.shape[:2] == packing.shape:
            hidden_states = packing.pack(hidden_states)
        args, kwargs = self._packed_arguments(packing, args, kwargs)
        return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _packed_arguments(self, packing, args, kwargs):
        return args, kwargs


class BiasedLayer(Layer):
    """A layer whose first has a bias over positions, which are counted in each sequence."""

    def _packed_arguments(self, packing, args, kwargs):
        attention = self.layer[0].SelfAttention
        given = args[0] if args else kwargs.get("position_bias")
        if given is not None or not attention.has_relative_attention_bias:
            return args, kwargs
        L = packing.shape[1]
        bias = attention.compute_bias(L, L, device=packing.indices.device)
        if args:
            return (bias, *args[1:]), kwargs
        return args, {**kwargs, "position_bias": bias}


class RotaryLayer(Layer):
    """A layer that is given the cosines and sines of its tokens' positions."""

    def _packed_arguments(self, packing, args, kwargs):
        tables = kwargs.get("position_embeddings")
        if tables is None:
            return args, kwargs
        return args, {**kwargs, "position_embeddings": packing.tables(tables)}


def _begin(hidden_states: Tensor, mask: Tensor | None) -> Packing | None:
    """The packing of this forward pass; a new one if this is the first layer and it may begin."""
    packing = packing_of(mask)
    scope = _scope.get()
    if packing is not None or scope is None:
        return packing
    pattern = pattern_of(mask)
    if pattern is None or pattern.lengths is None:
        return None
    B, L, Lk = pattern.shape
    real = sum(pattern.lengths)
    shape = (1, real) if scope.packing is not None else (B, L)
    if hidden_states.dim() != 3 or tuple(hidden_states.shape[:2]) != shape or Lk != L:
        return None
    if scope.packing is None:
        if pattern.window[0] != pattern.window[1] or pattern.offset != 0:
            return None  # a decoder's
        if min(pattern.lengths) == 0 or real > (1 - _WORTH_IT) * B * L or _is_seen(scope.stack):
            return None
    packing = Packing.begin(mask, pattern)
    scope.packing = scope.packing or packing
    return packing


def _is_seen(stack: Module) -> bool:
    """Whether something outside would see shapes inside `stack`."""
    if _active_collector is None or _active_collector.get():
        return True
    for module in stack.modules():
        hooks = (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *(module._backward_hooks or {}).values(),
            *(module._backward_pre_hooks or {}).values(),
        )
        # transformers leaves its recorders in place, idle unless something is recorded.
        if any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks):
            return True
        if module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule":
            return True  # compiled code neither packs nor knows of packing
        if module.training and getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                return True  # it recomputes with a copy of the mask
    return False


def _unpacked(output, packing: Packing):
    if isinstance(output, Tensor):
        return packing.unpack(output)
    if isinstance(output, tuple):
        return packing.unpack(output[0]), *output[1:]
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output
