"""torch.nn.GELU on the library's gelu."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops.gelu import gelu


class GELU(torch.nn.GELU):
    """torch.nn.GELU; inputs, errors and precision as in slimkernels.gelu."""

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input):
            return super().forward(input)
        return gelu(input, approximate=self.approximate)
