"""Which of transformers' classes compute the same: those whose forward is the same code.

A model file of transformers repeats the classes of others under its own names, so what is written
for BertSelfOutput here serves RobertaSelfOutput, and that of a family nobody thought of. A class
that computes something else has other code, and is left.
"""

from __future__ import annotations

import ast
import copyreg
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType

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

    So are the methods that it calls, and names that it looks up mean the same thing where both
    files know them.
    """
    other = prototype(family, name)
    if other is None:
        return False
    if cls is other:
        return True
    mine, theirs = _functions(cls), _functions(other)
    return mine.keys() == theirs.keys() and all(_alike(mine[n], theirs[n]) for n in mine)


@functools.cache
def fingerprint(family: str, name: str) -> str:
    """Eight digits of what transformers' class does, by which a later version is known as another.

    Comments, docstrings, annotations and layout do not count.
    """
    cls = prototype(family, name)
    texts = []
    for method, function in sorted(_functions(cls).items() if cls else ()):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, SyntaxError):
            return ""
        arguments = [a.arg for a in ast.walk(tree.args) if isinstance(a, ast.arg)]
        body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
        texts.append(f"{method}{arguments}" + "".join(ast.unparse(line) for line in body))
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:8]


# Each model file has its own.
_ITS_OWN = {"eager_attention_forward", "apply_rotary_pos_emb", "logger", "repeat_kv"}


def _functions(cls: type[Module]) -> dict[str, Callable]:
    """The forward that `cls` was written with, under its decorators, and the methods it calls."""
    forward = inspect.unwrap(cls.forward)
    if not inspect.isfunction(forward):
        return {}
    found = {"forward": forward}
    for name in forward.__code__.co_names:
        method = inspect.getattr_static(cls, name, None)
        if inspect.isfunction(method) and name not in vars(Module):
            found[name] = inspect.unwrap(method)
    return found


def _alike(mine: Callable, theirs: Callable) -> bool:
    if _code(mine) != _code(theirs):
        return False
    shared = set(mine.__code__.co_names) & set(mine.__globals__) & set(theirs.__globals__)
    return all(mine.__globals__[n] is theirs.__globals__[n] for n in shared - _ITS_OWN)


def _code(function: Callable) -> tuple:
    code = function.__code__
    constants = tuple(c for c in code.co_consts if c != function.__doc__)
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def combined(ours: tuple[type, ...], original: type[Module]) -> type[Module]:
    """The subclass of `original` that runs `ours`, the first of them first.

    It and its instances pickle. It bears the name of `original`, by which transformers keeps
    what a model can record, and others which modules not to split; its forward has the signature,
    by which generate() and the Trainer know what a model takes.
    """
    return _combined(ours, original)


class _Combined(type):
    """The type of combined classes, by which pickle knows how to make them again."""


def _parts(cls: type) -> str | tuple:
    parts = vars(cls).get("_slimkernels_parts")
    return cls.__qualname__ if parts is None else (combined, parts)


copyreg.pickle(_Combined, _parts)


@functools.cache
def _combined(ours, original):
    forward = ours[0].forward
    copied = FunctionType(
        *(forward.__code__, forward.__globals__, forward.__name__),
        *(forward.__defaults__, forward.__closure__),
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    members = {
        "forward": functools.update_wrapper(copied, original.forward),
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_slimkernels_class": ours[-1],
        "_slimkernels_parts": (ours, original),
    }
    return _Combined(original.__name__, (*ours, original), members)
