"""A language model's head and its loss in one module."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops._checks import check_tensor
from slimkernels.ops._loss_arguments import check_loss_options
from slimkernels.ops.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropy(torch.nn.Linear):
    """torch.nn.Linear(in_features, out_features) into torch.nn.CrossEntropyLoss, without logits.

    Parameters and state_dict are torch.nn.Linear's, so that weight can be tied to an embedding's
    and the layer's own forward, for the logits, is ``torch.nn.functional.linear``.

    forward(input, target, *, positions=None, return_correct=False) as
    slimkernels.linear_cross_entropy, of which the options are
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
    ) -> None:
        check_loss_options(
            "LinearCrossEntropy", ignore_index, reduction, label_smoothing, z_loss, softcap
        )
        super().__init__(in_features, out_features, bias, device, dtype)
        self.options = dict(
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
        )

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        positions: Tensor | None = None,
        return_correct: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        check_tensor("LinearCrossEntropy", "input", input)
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"LinearCrossEntropy: input must have a last dimension of {self.in_features}, "
                f"in_features; got shape {tuple(input.shape)}"
            )
        return linear_cross_entropy(
            *(input, self.weight, target, self.bias),
            **self.options,
            positions=positions,
            return_correct=return_correct,
        )

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{super().extra_repr()}, {options}"
