"""torch.nn.CrossEntropyLoss on the library's cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from slimkernels.nn._torchs_own import is_torchs
from slimkernels.ops._loss_arguments import check_loss_options
from slimkernels.ops.cross_entropy import cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss; inputs as in slimkernels.cross_entropy.

    Errors  ValueError for size_average and reduce, which torch has replaced by reduction
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        if size_average is not None or reduce is not None:
            raise ValueError(
                "CrossEntropyLoss: size_average and reduce are not implemented; use reduction"
            )
        check_loss_options("CrossEntropyLoss", ignore_index, reduction, label_smoothing, 0.0, None)
        super().__init__(
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if is_torchs(input) or has_torch_function_unary(input):  # which has a loss of its own
            return super().forward(input, target)
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
