"""Which of transformers' classes compute the same: those whose forward is the same code.

A model file of transformers repeats the classes of others under its own names, so what is written
for BertSelfOutput here serves RobertaSelfOutput, and that of a family nobody thought of. A class that
computes something else has other code, and is left.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable

from torch.nn import Module


@functools.cache
def prototype(family: str, name: str) -> type[Module] | None:
    """transformers' class `name` of a family; None where this version has none."""
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ImportError:
        return None
    return getattr(module, name, None)


@functools.cache
def is_twin(cls: type[Module], family: str, name: str) -> bool:
    """Whether the forward of `cls` is that of a class of transformers, instruction by instruction.

    Names that the code looks up must mean the same thing, too, where both know them.
    """
    other = prototype(family, name)
    if other is None:
        return False
    if cls is other:
        return True
    mine, theirs = _function(cls), _function(other)
    if mine is None or theirs is None or _code(mine) != _code(theirs):
        return False
    shared = set(mine.__code__.co_names) & set(mine.__globals__) & set(theirs.__globals__)
    return all(mine.__globals__[n] is theirs.__globals__[n] for n in shared - _ITS_OWN)


# Each model file has its own.
_ITS_OWN = {"eager_attention_forward", "apply_rotary_pos_emb", "logger", "repeat_kv"}


def _function(cls: type[Module]) -> Callable | None:
    """The forward that `cls` was written with, under its decorators."""
    function = inspect.unwrap(cls.forward)
    return function if inspect.isfunction(function) else None


def _code(function: Callable) -> tuple:
    code = function.__code__
    constants = tuple(c for c in code.co_consts if c != function.__doc__)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def combined(ours: type, original: type[Module]) -> type[Module]:
    """The subclass of `original` that runs `ours`; its instances pickle and deepcopy.

    It bears the name of `original`, by which transformers keeps what a model can record, and others
    which modules not to split.
    """
    return _combined(ours, original)


@functools.cache
def _combined(ours, original):
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": lambda self, protocol: (_make, (ours, original), self.__getstate__()),
        "_slimkernels_class": ours,
    }
    return type(original.__name__, (ours, original), members)


def _make(ours, original):
    cls = combined(ours, original)
    return cls.__new__(cls)
