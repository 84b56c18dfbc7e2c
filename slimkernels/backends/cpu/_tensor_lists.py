"""The table of many tensors that a C++ kernel takes: struct TensorLists in csrc/cpu."""

from __future__ import annotations

from array import array

from torch import Tensor

from slimkernels.backends._tensor_lists import TensorLists, flat
from slimkernels.backends.cpu._common import unsupported_tensor


def unsupported_lists(lists: TensorLists) -> str | None:
    return unsupported_tensor(lists.first) or lists.refusal


# Mirrors enum AdamRow in csrc/cpu/adam.h.
ADAM_COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")


def table(lists: TensorLists, columns: tuple[str, ...], *rows: list[int]) -> int:
    """The address of `columns`' addresses, a row each, zeros for an absent one; then of `rows`,
    which follow from the sizes alone, and the sizes."""
    if columns not in lists.kept:
        absent = [0] * len(lists)
        addresses = [lists.addresses.get(name, absent) for name in columns]
        lists.kept[columns] = array("q", flat([*addresses, *rows, lists.sizes]))
    return lists.kept[columns].buffer_info()[0]


def number(value: float | Tensor) -> float:
    """A number, or a tensor's: its memory is the host's."""
    return float(value)
