"""How backends that call native code name tensors: by address."""

from __future__ import annotations

from torch import Tensor


def pointer(x: Tensor | None) -> int:
    """The address of x's first element; 0, that of an empty tensor too, stands for None."""
    return 0 if x is None else x.data_ptr()


def pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]
