"""The table of many tensors that a C++ kernel takes: struct TensorLists in csrc/cpu."""

from __future__ import annotations

from array import array

from torch import Tensor

from slimkernels.backends._tensor_lists import TensorLists, flat
from slimkernels.backends.cpu._common import unsupported_tensor


def unsupported_lists(lists: TensorLists) -> str | None:
    return unsupported_tensor(lists.first) or lists.refusal


def table(lists: TensorLists, columns: tuple[str, ...]) -> int:
    """The address of `columns`' addresses, a row each, zeros for an absent one; then the sizes."""
    if columns not in lists.kept:
        absent = [0] * len(lists)
        rows = [lists.addresses.get(name, absent) for name in columns]
        lists.kept[columns] = array("q", flat([*rows, lists.sizes]))
    return lists.kept[columns].buffer_info()[0]


def number(value: float | Tensor) -> float:
    """A number, or a tensor's: its memory is the host's."""
    return float(value)
