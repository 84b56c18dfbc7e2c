"""What an optimizer's updates have in common as ops: they write the tensors that they are given.

An update is the documented exception to the contract of ops: it takes lists of tensors, changes
them in place, has no gradient and no registered torch op. Choice of backend, refusals and explain()
are those of every op. Its backends' modules have

    unsupported(*args) -> str | None
    update(*args)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimkernels.backends._tensor_lists import TensorLists
from slimkernels.dispatch import Op, _load

UPDATES: dict[str, Update] = {}


@dataclass(frozen=True)
class Update(Op):
    """An op of slimkernels.optim. OPS, whose every op has a public function, does not list it."""

    def __post_init__(self) -> None:
        for backend in self.order:
            self.modules[backend] = _load(backend, self.name)
        UPDATES[self.name] = self


def widened(row: dict[str, Tensor], clip: Tensor | None, maximize: bool) -> dict[str, Tensor]:
    """A row's tensors in the dtype that references compute in, the gradient as it enters.

    "param" is the master if there is one, unless somebody wrote the parameter since.
    """
    dtype = torch.promote_types(row["param"].dtype, torch.float32)
    wide = {name: tensor.to(dtype) for name, tensor in row.items() if name != "step"}
    if "master" in row:
        is_copy = row["master"].to(row["param"].dtype) == row["param"]
        wide["param"] = torch.where(is_copy, wide["master"], wide["param"])
    if clip is not None:
        wide["grad"] = wide["grad"] * clip[1]
    if maximize:
        wide["grad"] = -wide["grad"]
    return wide


def write(row: dict[str, Tensor], new: dict[str, Tensor], clip: Tensor | None) -> None:
    """Put a row's new values in place, the parameter's into its master too, if the step applies."""
    if "master" in row:
        new = {**new, "master": new["param"]}
    for name, value in new.items():
        if clip is not None:
            value = torch.where(clip[2] != 0, value.to(row[name].dtype), row[name])
        row[name].copy_(value)


__all__ = ["UPDATES", "TensorLists", "Update", "widened", "write"]
