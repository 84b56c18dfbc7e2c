"""torch.nn.RMSNorm on the library's rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm; inputs, errors and precision as in slimkernels.rms_norm."""

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input):
            return super().forward(input)
        return rms_norm(input, self.normalized_shape, self.weight, self.eps)
