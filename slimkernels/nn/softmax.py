"""torch.nn.Softmax on the library's softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops.softmax import softmax


class Softmax(torch.nn.Softmax):
    """torch.nn.Softmax; inputs, errors and precision as in slimkernels.softmax.

    dim     must be given: torch guesses it from the shape, warns, and calls that deprecated
    Errors  ValueError without dim
    """

    def __init__(self, dim: int | None = None) -> None:
        if dim is None:
            raise ValueError("Softmax: dim must be given; torch's implicit choice is deprecated")
        super().__init__(dim)

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim)
