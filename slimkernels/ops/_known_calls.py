"""Which backend was chosen for calls that have been checked before.

What takes microseconds to compute is not to wait for checks and for the choice of a backend, which
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

# Calls, and what was chosen for them automatically: "torch" where one function of torch is all of
# the op, or a backend that takes the call's tensors as they are. The first of a call's options is
# the op's name.
_known = CallMemory(4096)
_recall = _known.get  # one name less to look up
# Elements of the first tensor past which torch's own calls take long enough to be looked at. There,
# whether a gradient is wanted has a say too, which is not looked at below.
_LARGE = 1 << 22
ANY = 1 << 62
_TORCH_OR_NONE = "torch", None


def chosen_before(call: tuple[tuple, tuple]) -> str | None:
    """What has been chosen for this call, if no order and not autocast changes it; else None.

    All that a known call costs before its kernel is this, and in a model it runs out of cold
    caches, where each name that is looked up takes a microsecond: it does without what it can.
    Strides have no say: who chooses by them does not remember. Nor have modes and transforms, which
    torch's function sees like any other; batched and traced tensors are not known. A tensor with a
    tangent is, and needs_gradient() then says that autograd must see the kernel.
    """
    if is_dynamo_compiling() or dispatch._forced is not None or is_any_autocast():
        return None
    chosen = _recall(call)
    return None if chosen not in _TORCH_OR_NONE and is_transformed() else chosen


def remember(call: tuple[tuple, tuple], chosen: str = "torch", *, limit: int = _LARGE) -> None:
    """This call was given to one function of torch, or to a backend with its tensors as they are.

    limit  elements of the first tensor, above which the call is not kept
    """
    # What compiles or transforms a call, or has forced its backend, has had its say in the choice.
    if is_compiling() or dispatch._forced is not None or is_any_autocast() or is_transformed():
        return
    if forward_ad._current_level >= 0:
        return
    if call[0][0].numel() <= limit:
        _known.put(call, chosen)


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
