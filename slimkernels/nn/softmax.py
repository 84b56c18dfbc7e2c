"""torch.nn.Softmax and LogSoftmax on the library's ops."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops.log_softmax import log_softmax
from slimkernels.ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax; inputs, errors and precision as in slimkernels.softmax.

    dim     must be given: torch guesses it from the shape, warns, and calls that deprecated
    Errors  ValueError without dim
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__(_given("Softmax", dim))

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input):
            return super().forward(input)
        return softmax(input, self.dim)


class LogSoftmax(torch.nn.LogSoftmax):
    """torch.nn.LogSoftmax; inputs, errors and precision as in slimkernels.log_softmax.

    dim     must be given, as for Softmax
    Errors  ValueError without dim
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__(_given("LogSoftmax", dim))

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input):
            return super().forward(input)
        return log_softmax(input, self.dim)


def _given(name: str, dim: int | None) -> int:
    if dim is None:
        raise ValueError(f"{name}: dim must be given; torch's implicit choice is deprecated")
    return dim
