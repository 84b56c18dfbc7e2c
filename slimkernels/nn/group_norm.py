"""torch.nn.GroupNorm on the library's group_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops.group_norm import group_norm


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm; inputs, errors and precision as in slimkernels.group_norm."""

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input):
            return super().forward(input)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
