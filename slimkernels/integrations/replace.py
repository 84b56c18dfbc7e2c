"""slimkernels.replace: the library's modules in place of those of an existing model."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from slimkernels.integrations._swap import (
    Swap,
    changed_since,
    class_of,
    is_swapped,
    swap,
    swap_back,
)
from slimkernels.integrations.report import UNKNOWN, UNKNOWN_LEAF, Report, Row, kind_of
from slimkernels.ops._checks import check_flag

# Modules with swaps, and the package without which none of theirs can be in a model.
_SOURCES = {
    "slimkernels.integrations._swaps_huggingface": "transformers",
    "slimkernels.integrations._swaps_torch": "torch",
}
_QUANTISED = ("torch.ao.", "torch.nn.quantized.", "torchao.", "bitsandbytes.", "auto_gptq.", "awq.")


def replace(model: Module, *, inplace: bool = True) -> Report:
    """Run the modules of `model` that the library knows on its kernels.

    Of a module that is swapped the class changes, on this instance alone, to a subclass of what it
    was: parameters, buffers, state_dict, tied weights, hooks, device, dtype, mode, and whatever
    refers to the module stay. No class and no function of torch or of the model is changed.
    A module that is of no known class exactly (a subclass, a parametrized one), whose forward has
    been replaced, or that asks for what is not implemented is left; the report says why.

    inplace  True changes `model` itself, False a deep copy
    Returns  a Report: ``.model`` (the one changed), ``.rows``, ``.swapped``, ``.already``,
             ``.left``; ``print(report)`` shows a table. A second call swaps nothing more.
    Errors   ValueError for what is not an instance of torch.nn.Module, for an inplace that is
             neither True nor False, and for a model that is compiled or scripted already, even in
             part: replace first, then compile
    Caution  torch.jit and torch.fx.symbolic_trace cannot read the modules that take the places:
             restore() first. torch.compile and torch.export can.
    """
    _check_model("replace", model)
    check_flag("replace", "inplace", inplace)
    for path, how in _compiled(model):
        raise ValueError(
            f"replace: model must not be {how} yet, and {path or 'it'} is; "
            f"replace first, then compile"
        )
    if not inplace:
        model = copy.deepcopy(model)
    sources = _sources()
    rows = [_visit(path, module, sources) for path, module in model.named_modules()]
    return Report(model, rows)


def restore(model: Module) -> Report:
    """Undo replace(): classes, attributes and outputs are bit for bit as before.

    Returns  a Report whose rows are what was restored; a model that was never swapped has none
    Errors   ValueError for what is not an instance of torch.nn.Module, and, before anything is
             changed, for a swapped module to which another class was given since (parametrized)
    """
    _check_model("restore", model)
    swapped = [(path, module) for path, module in model.named_modules() if is_swapped(module)]
    for path, module in swapped:
        if (name := changed_since(module)) is not None:
            raise ValueError(
                f"restore: {path or 'model'} must be of the class that replace gave it, and has "
                f"become a {name} since; undo that first"
            )
    rows = []
    for path, module in swapped:
        kind = kind_of(class_of(module))
        swap_back(module)
        rows.append(Row(path, kind, "restored", kind_of(class_of(module))))
    return Report(model, rows)


def _visit(path: str, module: Module, sources: list[ModuleType]) -> Row:
    cls = class_of(module)
    kind = kind_of(cls)
    if is_swapped(module):
        return Row(path, kind, "already", "swapped before")
    if any(cls is how.ours for source in sources for how in source.SWAPS.values()):
        return Row(path, kind, "already", "of slimkernels as it was made")
    how = _find(module, sources)
    if not isinstance(how, Swap):
        return Row(path, kind, "left", how)
    reason = _general_refusal(module) or how.refuse(module)
    if reason is not None:
        return Row(path, kind, "left", reason)
    swap(module, how)
    detail = kind_of(class_of(module)) if how.says is None else how.says(module)
    return Row(path, kind, "swapped", detail)


def _find(module: Module, sources: list[ModuleType]) -> Swap | str:
    """How to swap `module`, or why nobody knows."""
    cls = class_of(module)
    for source in sources:
        how = source.SWAPS.get(cls)
        if how is None and hasattr(source, "swap_for"):
            how = source.swap_for(module)
        if how is not None:
            return how
    if parametrize.is_parametrized(module):
        return "parametrized: its class was made for it alone"
    if cls.__module__.startswith(_QUANTISED):
        return "quantised"
    for base in cls.__mro__[1:]:
        if any(base in source.SWAPS for source in sources):
            return f"a subclass of {kind_of(base)}, which may do something else"
    return UNKNOWN if any(True for _ in module.children()) else UNKNOWN_LEAF


def _general_refusal(module: Module) -> str | None:
    """What keeps any module from being swapped."""
    if "forward" in vars(module):
        return "its forward has been replaced on the instance"
    return None


def _sources() -> list[ModuleType]:
    """Those whose package is imported: a model has none of another's modules."""
    sources = []
    for name, package in _SOURCES.items():
        if package not in sys.modules:
            continue
        try:
            sources.append(importlib.import_module(name))
        except ImportError as error:  # another version than it is for
            sources.append(_unusable(package, str(error)))
    return sources


def _unusable(package: str, why: str) -> SimpleNamespace:
    """A source that refuses every module of `package`."""

    def swap_for(module):
        cls = class_of(module)
        return Swap(cls, None, lambda _: why) if cls.__module__.startswith(f"{package}.") else None

    return SimpleNamespace(SWAPS={}, swap_for=swap_for)


def _check_model(function: str, model: object) -> None:
    if isinstance(model, type) and issubclass(model, Module):
        got = f"the class {model.__name__} itself"
    elif not isinstance(model, Module):
        got = type(model).__name__
    else:
        return
    raise ValueError(f"{function}: model must be an instance of torch.nn.Module; got {got}")


def _compiled(model: Module) -> Iterator[tuple[str, str]]:
    """(path, how) of each module that was compiled."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    compiled = () if dynamo is None else dynamo.OptimizedModule
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            yield path, "scripted"
        elif isinstance(module, compiled) or module._compiled_call_impl is not None:
            yield path, "compiled"
