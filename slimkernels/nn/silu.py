"""torch.nn.SiLU on the library's silu."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops.silu import silu


class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU; inputs, errors and precision as in slimkernels.silu. Never in place."""

    def __init__(self, inplace: bool = False):
        if inplace:
            raise ValueError("SiLU: inplace=True is not implemented: inputs are never written")
        super().__init__()

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input):
            return super().forward(input)
        return silu(input)
