"""torch.nn.Dropout on the library's bias_dropout_add."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops.bias_dropout_add import bias_dropout_add


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout; other elements are dropped than by torch from the same seed.

    inplace=True is torch's own, and so is p=1.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        if is_torchs(input) or self.inplace or not 0 < self.p < 1 or input.dim() == 0:
            return super().forward(input)
        return bias_dropout_add(input, dropout_p=self.p)
