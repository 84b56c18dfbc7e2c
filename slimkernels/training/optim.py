"""AdamW with the parameter groups that transformers are trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkernels.optim import AdamW


def adamw(
    model: nn.Module,
    lr: float,
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    weight_decay: float,
    is_torchs: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): slimkernels.optim's, or torch's fused one.

    Matrices decay; biases and the gains of norms, being vectors, do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    options = {"lr": lr, "betas": betas, "eps": 1e-6}
    # On a GPU torch's remains until a benchmark there shows ours to be no slower.
    if is_torchs or parameters[0].device.type != "cpu":
        return torch.optim.AdamW(groups, **options, fused=True)
    return AdamW(groups, **options)


def clip_and_step(optimizer: torch.optim.Optimizer, max_norm: float) -> Tensor:
    """One step, with the gradients scaled to at most `max_norm` together; their norm before that.

    Where the norm is not finite there is no update: the parameters stay as they were. Decided on
    the device: nothing waits.
    """
    if isinstance(optimizer, AdamW):
        optimizer.max_grad_norm, optimizer.skip_nonfinite = max_norm, True
        optimizer.step()
        return optimizer.grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    # What a GradScaler tells the fused optimizer.
    optimizer.found_inf = norm.isfinite().logical_not().float()
    optimizer.step()
    return norm


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of a step counted from 0: a linear rise to `peak`, then a straight line to zero.

    A pure function of the step, so that a resumed run needs no state of it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)
