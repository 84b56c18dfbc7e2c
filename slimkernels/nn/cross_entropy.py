"""torch.nn.CrossEntropyLoss on the library's cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops.cross_entropy import REDUCTIONS, cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss of class labels; inputs as in slimkernels.cross_entropy.

    Errors  ValueError for weight, which is not implemented, and for size_average and reduce, which
            torch has replaced by reduction; in forward, for targets that are class probabilities
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
        if weight is not None:
            raise ValueError("CrossEntropyLoss: weight, of the classes, is not implemented")
        if size_average is not None or reduce is not None:
            raise ValueError(
                "CrossEntropyLoss: size_average and reduce are not implemented; use reduction"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"CrossEntropyLoss: reduction must be 'none', 'mean' or 'sum'; got {reduction!r}"
            )
        super().__init__(
            ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
