"""Calls that are known to be torch's own: checked before, and found to be faster in ATen.

What ATen computes in microseconds is not to wait for checks and for the choice of a backend, which
come to the same each time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch._C import _are_functorch_transforms_active as is_transformed
from torch._C import _is_any_autocast_enabled as is_any_autocast
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from slimkernels import dispatch
from slimkernels.ops._call_memory import CallMemory, NoCallMemory

# Calls for which an op's automatic choice was torch, and one function of torch is all of it.
# The first of a call's options is the op's name.
_known = CallMemory(4096)
_recall = _known.get  # one name less to look up
# Elements of the first tensor past which a call takes long enough to be looked at. There, whether
# a gradient is wanted has a say too, which is not looked at below.
_LARGE = 1 << 20


def is_torchs_own(call: tuple[tuple, tuple]) -> bool:
    """Whether this call has been remembered, and neither an order nor autocast changes it.

    All that a known call costs is this, and in a model it runs out of cold caches, where each name
    that is looked up takes a microsecond: it does without what it can. Strides have no say: torch
    gets the tensors as they are, either way. Nor have modes, transforms and forward-mode
    differentiation, which see torch's function like any other.
    """
    return (
        not is_dynamo_compiling()
        and dispatch._forced is None
        and not is_any_autocast()
        and _recall(call) is not None
    )


def remember(call: tuple[tuple, tuple]) -> None:
    """This call was given to one function of torch."""
    # What compiles or transforms a call, or has forced its backend, has had its say in the choice.
    if is_compiling() or dispatch._forced is not None or is_any_autocast() or is_transformed():
        return
    if forward_ad._current_level >= 0:
        return
    x = call[0][0]
    if not x.is_cpu or x.numel() > _LARGE:  # on a GPU the host is ahead
        return
    _known.put(call, True)


def forget() -> None:
    """For who changes what a choice depends on, as tests do."""
    _known.clear()


@contextlib.contextmanager
def nothing_known() -> Iterator[None]:
    """For who watches choices, as doctor does: inside, every call makes its own."""
    global _recall
    kept, _recall = _recall, NoCallMemory().get
    try:
        yield
    finally:
        _recall = kept
