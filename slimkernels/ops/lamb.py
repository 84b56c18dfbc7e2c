"""LAMB (You et al. 2020) over many tensors at once, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import on_device_of
from slimkernels.ops._update import TensorLists, Update, widened, write


def lamb_reference(
    lists: TensorLists,
    clip: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """The definition, in float32, or in float64 if the parameters are."""
    for row in lists.rows():
        old = widened(row, clip, maximize)
        step = row["step"].double() + 1
        m = old["exp_avg"].lerp(old["grad"], 1 - betas[0])
        v = old["exp_avg_sq"].mul(betas[1]).addcmul_(old["grad"], old["grad"], value=1 - betas[1])
        spread = (1 - betas[1] ** step).sqrt()
        direction = m / (1 - betas[0] ** step) / v.sqrt().div_(spread).add_(eps)
        direction.add_(old["param"], alpha=weight_decay)
        norms = old["param"].norm(), direction.norm()
        ratio = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0)
        param = old["param"] - direction * (lr * ratio)
        write(row, {"step": step, "exp_avg": m, "exp_avg_sq": v, "param": param}, clip)


def lamb(
    lists: TensorLists,
    clip: Tensor | None = None,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One step of LAMB for every row of `lists`; arguments as in slimkernels.ops.adamw."""
    args = (lists, clip, lr, betas, eps, weight_decay, maximize)
    chosen = LAMB.select(*args, backend=backend)
    if chosen == "torch":
        lamb_reference(*args)
    else:
        on_device_of(lists.first, LAMB.modules[chosen].update, *args)
        torch.autograd.graph.increment_version(lists.columns["param"])


def _arguments(lists, clip=None, *, lr, betas, eps, weight_decay, maximize=False):
    return lists, clip, lr, betas, eps, weight_decay, maximize


# Order: triton alone computes on CUDA tensors, cpu on the others.
LAMB = Update("lamb", order=("triton", "cpu"), arguments=_arguments)
