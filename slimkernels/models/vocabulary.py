"""A language model's output: hidden states to scores of every token, and to the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkernels.models.config import TransformerConfig
from slimkernels.ops.cross_entropy import cross_entropy
from slimkernels.ops.linear import linear
from slimkernels.ops.linear_cross_entropy import linear_cross_entropy


class Vocabulary(nn.Module):
    """The vocabulary's matrix where it is not the token embedding, and its bias if there is one."""

    def __init__(self, config: TransformerConfig, *, has_bias: bool = False) -> None:
        """has_bias: scores have constants, (1, V), which are not trained."""
        super().__init__()
        self.scale = config.logit_scale
        if not config.tie_embeddings:
            self.matrix = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Buffer(torch.zeros(1, config.vocab_size)) if has_bias else None

    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C); table (V, C) is the token embedding's."""
        return linear(self._scaled(hidden), self._weight(table), self._constants())

    def loss(
        self, hidden: Tensor, table: Tensor, targets: Tensor, *, skip_logits: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Logits, or None, and the mean loss, in float32 at least; targets (...), -100 for none."""
        targets = targets.flatten()
        if skip_logits:
            hidden, weight = self._scaled(hidden).flatten(0, -2), self._weight(table)
            loss = linear_cross_entropy(hidden, weight, targets, self._constants())
            logits = None
        else:
            logits = self(hidden, table)
            loss = cross_entropy(logits.flatten(0, -2), targets)
        return logits, loss.to(torch.promote_types(loss.dtype, torch.float32))

    def _constants(self):
        return None if self.bias is None else self.bias[0]

    def _scaled(self, hidden):
        return hidden if self.scale == 1.0 else hidden * self.scale

    def _weight(self, table):
        return self.matrix.weight if hasattr(self, "matrix") else table
