"""torch.nn.LayerNorm on the library's layer_norm."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.nn._torchs_own import is_small, is_torchs
from slimkernels.ops.layer_norm import layer_norm


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm; inputs, errors and precision as in slimkernels.layer_norm."""

    def forward(self, input: Tensor) -> Tensor:
        if is_torchs(input) or (is_small(input) and self._has_one_dtype(input)):
            return super().forward(input)
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)

    def _has_one_dtype(self, input: Tensor) -> bool:
        return self.weight is None or self.weight.dtype == input.dtype
