"""Calls that are known to be torch's own: checked before, and found to be faster in ATen.

What ATen computes in microseconds is not to wait for checks and for the choice of a backend, which
come to the same each time. A call is known by everything that they look at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._C import _are_functorch_transforms_active as is_transformed
from torch._C import _is_any_autocast_enabled as is_any_autocast
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from slimkernels.dispatch import is_forced

# Calls for which an op's automatic choice was torch, and one function of torch is all of it.
_known: set[tuple] = set()
_MOST_KNOWN = 4096
# Elements of the first tensor past which a call takes long enough to be looked at. There, whether
# a gradient is wanted has a say too, which is not looked at below.
_LARGE = 1 << 20

_STRIDED = torch.strided
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_ORDINARY = (int, float, bool, str, tuple, torch.Size, type(None))


def is_torchs_own(op: str, tensors: tuple, options: tuple) -> bool:
    """Whether a call with these arguments, `tensors` being tensors or None, has been remembered."""
    try:
        return _signature(op, tensors, options) in _known
    except TypeError:  # a list among the options
        return False


def remember(op: str, tensors: tuple, options: tuple) -> None:
    """The call of these arguments was given to one function of torch."""
    signature = _signature(op, tensors, options)
    if signature is None or tensors[0].numel() > _LARGE:
        return
    if not all(type(option) in _ORDINARY for option in options):
        return
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known.add(signature)


def forget() -> None:
    """For who changes what a choice depends on, as tests do."""
    _known.clear()


class _Nothing(set):
    """What stays empty."""

    def add(self, _) -> None:
        pass


@contextlib.contextmanager
def nothing_known() -> Iterator[None]:
    """For who watches choices, as doctor does: inside, every call makes its own."""
    global _known
    kept, _known = _known, _Nothing()
    try:
        yield
    finally:
        _known = kept


def _signature(op: str, tensors: tuple, options: tuple) -> tuple | None:
    """What is looked at of a call; None where more than that has a say.

    That is modes, orders and transforms, and tensors that are not plain and on the CPU: on a GPU
    the host is ahead. Strides have none: torch gets the tensors as they are, either way.
    All that a known call costs is this, and in a model it runs out of cold caches, where each name
    and attribute that is looked up takes a fifth of a microsecond: it does without what it can.
    """
    if is_compiling() or is_forced() or is_any_autocast() or is_transformed():
        return None
    if forward_ad._current_level >= 0:
        return None
    # 1 and True are equal, and only one of them passes a check: hence the types.
    parts = [op, options, *map(type, options)]
    for t in tensors:
        if t is None:
            parts.append(None)
        elif type(t) in _TENSORS and t.is_cpu and t.layout is _STRIDED and not t.is_nested:
            parts += t.shape, t.dtype
        else:
            return None
    return tuple(parts)
