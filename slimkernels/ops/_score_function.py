"""The user's own function of attention's scores: its two forms, its name, and its errors."""

from __future__ import annotations

import importlib
import inspect
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_COUNT = itertools.count()
_TAKES = {"score": ("score", "batch", "head", "i", "j", "tensors")}
_TAKES |= {"derivative": _TAKES["score"], "mask": _TAKES["score"][1:]}
_FORMS = "score", "derivative", "torch_score", "mask", "torch_mask"


class ScoreFunction:
    """Your own change of the scores, or your own mask, inside the kernels.

    Make it once, outside what torch.compile traces. The Triton functions are called on a tile and
    must broadcast; `score` is float32, and `batch`, `head`, `i` (query) and `j` (key) are integers,
    counted within the sequence, in shapes that broadcast to score's. `tensors` is the tuple
    AttentionVariant.score_tensors, pointers in Triton. It can be pickled if its functions stand at
    the top of modules.

    score       @triton.jit (score, batch, head, i, j, tensors) -> the new score
    derivative  @triton.jit, the same parameters -> d new score / d score; where query, key or bias
                need gradients
    mask        @triton.jit (batch, head, i, j, tensors) -> whether query i sees key j
    torch_score, torch_mask   the same in PyTorch: the definition, and what the backend "torch" runs
    Errors      ValueError for a function without its counterpart or with other parameters

    What FlexAttention (Dong et al. 2024) calls score_mod and mask_mod.
    """

    # A registered op takes no objects: torch.compile's graph names the function. Weak, so that
    # functions made in a loop do not pile up.
    _known: dict[str, weakref.ref[ScoreFunction]] = {}
    # A graph holds but the name of a function, and may outlive it.
    _traced: dict[str, ScoreFunction] = {}

    def __init__(
        self,
        *,
        score: Any = None,
        derivative: Any = None,
        torch_score: Callable | None = None,
        mask: Any = None,
        torch_mask: Callable | None = None,
    ) -> None:
        for what, kernel, definition in (
            ("score", score, torch_score),
            ("mask", mask, torch_mask),
        ):
            if (kernel is None) != (definition is None):
                missing = f"torch_{what}" if definition is None else what
                raise ValueError(f"ScoreFunction: {missing} is missing: {what} needs both forms")
        if score is None and mask is None:
            raise ValueError("ScoreFunction: score or mask must be given")
        if derivative is not None and score is None:
            raise ValueError("ScoreFunction: derivative must be None without score")
        for what, kernel in (("score", score), ("derivative", derivative), ("mask", mask)):
            if kernel is not None and not hasattr(kernel, "fn"):  # triton is not everywhere
                got = getattr(kernel, "__name__", type(kernel).__name__)
                raise ValueError(f"ScoreFunction: {what} must be a @triton.jit function; got {got}")
        for what, definition in (("torch_score", torch_score), ("torch_mask", torch_mask)):
            if definition is not None and not callable(definition):
                got = type(definition).__name__
                raise ValueError(f"ScoreFunction: {what} must be a function; got {got}")
        self.score, self.derivative, self.mask = score, derivative, mask
        self.torch_score, self.torch_mask = torch_score, torch_mask
        for what in _FORMS:
            _check_parameters(what, getattr(self, what))
        self.name = f"{next(_COUNT)}:{_name_of(score or mask)}"
        self._known[self.name] = weakref.ref(self)
        weakref.finalize(self, self._known.pop, self.name)

    @classmethod
    def named(cls, name: str) -> ScoreFunction:
        """The function that a graph, or what backward kept, calls by this name."""
        reference = cls._known.get(name)
        function = None if reference is None else reference()
        if function is None:
            raise ValueError(
                f"scaled_dot_product_attention: the score function {name!r} of a saved graph must "
                f"be made before it runs, and kept; there are {', '.join(cls._known) or 'none'}"
            )
        return function

    def keep(self) -> None:
        """Keep it for as long as the process lives, as a compiled graph may."""
        self._traced[self.name] = self

    def changed(self, scores: Tensor, *indices_and_tensors) -> Tensor:
        """torch_score's result, checked."""
        changed = _call("torch_score", self.torch_score, scores, *indices_and_tensors)
        _check_result("torch_score", self.torch_score, changed, scores.shape, "floating")
        return changed

    def seen(self, *indices_and_tensors) -> Tensor:
        """torch_mask's result, checked."""
        shape = torch.broadcast_shapes(*(t.shape for t in indices_and_tensors[:4]))
        seen = _call("torch_mask", self.torch_mask, *indices_and_tensors)
        _check_result("torch_mask", self.torch_mask, seen, shape, "bool")
        return seen

    def __copy__(self) -> ScoreFunction:
        return self

    def __deepcopy__(self, memo: dict) -> ScoreFunction:
        return self  # a function, of which a copied model needs no second one

    def __reduce__(self) -> tuple:
        return _made_again, tuple(_place_of(what, getattr(self, what)) for what in _FORMS)


def run_kernels(launch: Callable, *args, function: ScoreFunction | None) -> Any:
    """launch(*args); an error of Triton in kernels that the function is part of names it."""
    if function is None:
        return launch(*args)
    try:
        return launch(*args)
    except Exception as error:
        if not type(error).__module__.startswith("triton."):
            raise
        raise RuntimeError(
            f"scaled_dot_product_attention: the kernel with the score function "
            f"{function.name.partition(':')[2]} fails: {error}"
        ) from error


def _name_of(function) -> str:
    return getattr(getattr(function, "fn", function), "__qualname__", None) or repr(function)


def _check_parameters(what, function):
    names = _TAKES[what.removeprefix("torch_")]
    try:
        signature = inspect.signature(getattr(function, "fn", function))
    except (TypeError, ValueError):  # not every callable has one
        return
    try:
        signature.bind(*names)
    except TypeError:
        raise ValueError(
            f"ScoreFunction: {what} must take ({', '.join(names)}); "
            f"got {_name_of(function)}{signature}"
        ) from None


def _call(what, function, *arguments):
    try:
        return function(*arguments)
    except torch.OutOfMemoryError:  # which callers look for
        raise
    except Exception as error:
        raise RuntimeError(
            f"scaled_dot_product_attention: {what} {_name_of(function)} raises "
            f"{type(error).__name__}: {error}"
        ) from error


def _check_result(what, function, result, shape, kind):
    if isinstance(result, Tensor):
        right = result.dtype == torch.bool if kind == "bool" else result.is_floating_point()
        got = f"{result.dtype} {tuple(result.shape)}"
        pairs = zip(reversed(result.shape), reversed(shape), strict=False)
        right = right and result.dim() <= len(shape) and all(m in (1, n) for m, n in pairs)
    else:
        right, got = False, type(result).__name__
    if not right:
        raise ValueError(
            f"scaled_dot_product_attention: {what} {_name_of(function)} must return a {kind} "
            f"tensor that broadcasts to {tuple(shape)}; got {got}"
        )


def _place_of(what, function):
    """Where a module has the function, for pickle, which cannot find what @triton.jit returns."""
    if function is None:
        return None
    plain = getattr(function, "fn", function)
    place = getattr(plain, "__module__", None), getattr(plain, "__qualname__", None)
    if None in place or _at(place) is not function:
        raise pickle.PicklingError(
            f"ScoreFunction: {what} must stand at the top of a module to be pickled; "
            f"got {_name_of(function)}"
        )
    return place


def _at(place):
    module, name = place
    return getattr(importlib.import_module(module), name, None)


def _made_again(*places):
    functions = (None if place is None else _at(place) for place in places)
    return ScoreFunction(**dict(zip(_FORMS, functions, strict=True)))
