"""Many tensors that one kernel call reads and writes: their columns, addresses and layout.

An optimizer keeps its TensorLists between steps, but not the tensors: a gradient kept would be
memory that nobody can free. Each step gives them anew; what a backend derives from them (a table of
addresses on the device) stays while sizes, layouts and addresses do.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


class TensorLists:
    """Columns of tensors, one row a parameter; rows are updated independently of each other.

    columns    name -> tensors of one device; "grad" is always there, others may be absent. Empty
               after release()
    layout     name -> all that `refusal` and `sizes` follow from
    addresses  name -> the tensors' addresses
    identities name -> the tensors' ids
    sizes      elements of each row's tensors
    refusal    why no kernel may read these tensors, in a sentence; None if one may
    kept       what a backend derived from the addresses; emptied when one changes
    cut        what a backend derived from the sizes
    captured   memory that a captured CUDA graph reads: held, whatever else changes
    """

    def __init__(
        self, columns: dict[str, list[Tensor]], captured: list[Tensor] | None = None
    ) -> None:
        self.columns = columns
        self.layout = {name: _layout(tensors) for name, tensors in columns.items()}
        self.addresses, self.identities = _addresses(columns), _identities(columns)
        self.sizes = [tensor.numel() for tensor in columns["grad"]]
        self.refusal = next(filter(None, map(_refusal, self.rows())), None)
        self.kept: dict = {}
        self.cut: dict = {}
        self.captured = [] if captured is None else captured

    def rows(self):
        """Each row's tensors, by column."""
        for row in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, row, strict=True))

    def renewed(self, columns: dict[str, list[Tensor]]) -> TensorLists:
        """These lists with other tensors of the same layout; new ones for another layout."""
        if columns.keys() != self.layout.keys():
            return TensorLists(columns, self.captured)
        addresses, identities = _addresses(columns), _identities(columns)
        for name, tensors in columns.items():
            # A state is its optimizer's own: the same tensor at the same address is as it was. A
            # gradient may be another tensor there, and anybody may give a parameter new data.
            is_known = (addresses[name], identities[name]) == (
                self.addresses[name],
                self.identities[name],
            )
            if is_known and name not in ("param", "grad"):
                continue
            if _layout(tensors) != self.layout[name]:
                return TensorLists(columns, self.captured)
        if addresses != self.addresses:
            self.addresses, self.kept = addresses, {}
        self.columns, self.identities = columns, identities
        return self

    def release(self) -> None:
        """Let go of the tensors, and of what was derived from them while a graph was captured: it
        is not there before the graph is replayed."""
        if self.first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.kept, self.cut = {}, {}
        self.columns = {}

    @property
    def first(self) -> Tensor:
        """A tensor that has the device and dtype of all."""
        return self.columns["grad"][0]

    def __len__(self) -> int:
        return len(self.sizes)


def _addresses(columns: dict[str, list[Tensor]]) -> dict[str, list[int]]:
    return {name: list(map(Tensor.data_ptr, tensors)) for name, tensors in columns.items()}


def _identities(columns: dict[str, list[Tensor]]) -> dict[str, list[int]]:
    return {name: list(map(id, tensors)) for name, tensors in columns.items()}


def _layout(tensors: list[Tensor]) -> list[list]:
    # Loops in C: this is host time of every step.
    return [list(map(of, tensors)) for of in _FACTS]


_FACTS = (
    type,
    attrgetter("dtype"),
    attrgetter("device"),
    Tensor.size,
    Tensor.stride,
    Tensor.is_neg,
)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the same offset is the same element of two tensors of one shape."""
    return (a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride()


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill its memory, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    return torch.ops.aten.is_non_overlapping_and_dense(x)


def _refusal(row: dict[str, Tensor]) -> str | None:
    first = row.get("param", row["grad"])
    for name, tensor in row.items():
        if type(tensor) not in PLAIN:
            return f"it reads plain tensors and {name} is a {type(tensor).__name__}"
        if tensor.is_neg():
            return f"it reads memory as it stands and {name} is a lazy negation"
        if name == "step":
            wanted = torch.float32
        else:
            if tensor.shape != first.shape:
                shapes = f"{tuple(tensor.shape)} and its parameter {tuple(first.shape)}"
                return f"it walks tensors of one shape together and {name} has {shapes}"
            if not is_dense(tensor) or not same_layout(tensor, first):
                return f"it reads memory without gaps and {name} has strides {tensor.stride()}"
            wanted = first.dtype if name in ("param", "grad") else torch.float32
        if tensor.dtype != wanted:
            return f"it is written for {name} in {wanted} and it is {tensor.dtype}"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device} and its parameter on {first.device}"
    return None


def flat(table: list[list[int]]) -> list[int]:
    """The rows of a table, one after the other."""
    return list(chain.from_iterable(table))
