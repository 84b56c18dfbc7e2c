"""How one module is swapped, and swapped back.

A swap changes the class of a module, of this instance only, to a subclass of its class: parameters,
buffers, hooks, mode and identity stay, and so does everything that refers to them. What is needed
to undo it lies in the module itself, where deepcopy and pickle carry it.

Another source of swaps is a module with a table ``SWAPS: dict[type, Swap]`` and, for modules that
are not known by their exact class, a function ``swap_for(module) -> Swap | None``; replace.py names
the sources. A compound needs no say over its parts: they are looked at like all others, and a
forward that fuses a part asks ``nn._parts.is_plain`` whether that still does what is fused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn import Module

MARK = "_slimkernels_swap"


@dataclass(frozen=True)
class Swap:
    """One class that can be swapped.

    original  the class, exactly: a subclass of it may do something else and is left
    ours      a subclass of original, whose forward does the same without an __init__ of its own
              having run; None to keep the class and only adapt
    refuse    why this instance is left, in a sentence; None if it can be swapped. Changes nothing.
    adapt     changes what `ours` needs changed besides (attributes, a config), before the class is;
              returns what `undo` needs, such as the former values: deepcopy and pickle must do
    undo      undo(module, adapt's result) sets it back, bit for bit, after the class. A function
              of a module's top level: pickle carries it by name
    says      says(module) is what the report says of a swapped module; None for its new class
    """

    original: type[Module]
    ours: type[Module] | None
    refuse: Callable[[Module], str | None] = lambda module: None
    adapt: Callable[[Module], Any] | None = None
    undo: Callable[[Module, Any], None] | None = None
    says: Callable[[Module], str] | None = None


def is_swapped(module: Module) -> bool:
    return MARK in vars(module)


def swap(module: Module, how: Swap) -> None:
    original = class_of(module)
    mark = {"original": original, "ours": how.ours or original, "undo": how.undo, "saved": None}
    if how.adapt is not None:
        mark["saved"] = how.adapt(module)
    _set_class(module, mark["ours"])
    vars(module)[MARK] = mark


def changed_since(module: Module) -> str | None:
    """The class that somebody else has given a swapped module; None if it has ours."""
    cls = class_of(module)
    return None if cls is vars(module)[MARK]["ours"] else cls.__name__


def swap_back(module: Module) -> None:
    mark = vars(module).pop(MARK)
    _set_class(module, mark["original"])
    if mark["undo"] is not None:
        mark["undo"](module, mark["saved"])


def class_of(module: Module) -> type[Module]:
    """The class of `module`, or that under the one which FSDP2 has put over it."""
    cls = type(module)
    return cls.__bases__[1] if _is_sharded(cls) else cls


# The classes that fully_shard has put over others, or would have, by their two bases.
_sharded: dict[tuple[type, ...], type] = {}


def _set_class(module: Module, cls: type[Module]) -> None:
    present = type(module)
    if _is_sharded(present):
        _sharded[present.__bases__] = present
        bases = present.__bases__[0], cls
        if bases not in _sharded:
            body = {"__deepcopy__": present.__dict__["__deepcopy__"]}
            _sharded[bases] = type(f"FSDP{cls.__name__}", bases, body)
        cls = _sharded[bases]
    module.__class__ = cls


def _is_sharded(cls: type) -> bool:
    """Whether fully_shard made `cls`, a subclass of FSDPModule and of the class as it was."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and cls.__bases__[:1] == (fsdp.FSDPModule,) and len(cls.__bases__) == 2
