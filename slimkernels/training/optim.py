"""AdamW with the parameter groups that transformers are trained with."""

from __future__ import annotations

import torch
from torch import nn


def adamw(
    model: nn.Module, lr: float, *, betas: tuple[float, float] = (0.9, 0.98), weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in torch's fused form.

    Matrices decay; biases and the gains of norms, being vectors, do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-6, fused=True)


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of a step counted from 0: a linear rise to `peak`, then a straight line to zero.

    A pure function of the step, so that a resumed run needs no state of it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)
