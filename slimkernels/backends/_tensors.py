"""How backends that call native code name tensors: by address."""

from __future__ import annotations

from array import array

from torch import Tensor


def pointer(x: Tensor | None) -> int:
    """The address of x's first element; 0, that of an empty tensor too, stands for None."""
    return 0 if x is None else x.data_ptr()


def pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def address(numbers: array | None) -> int:
    """Where a struct of 64-bit integers lies, which its array must outlive; 0 stands for None."""
    return 0 if numbers is None else numbers.buffer_info()[0]
