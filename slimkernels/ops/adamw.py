"""AdamW (Loshchilov, Hutter 2019) over many tensors at once, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import on_device_of
from slimkernels.ops._update import TensorLists, Update, widened, write


def adamw_reference(
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
        new = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        if "max_exp_avg_sq" in row:
            v = new["max_exp_avg_sq"] = torch.maximum(old["max_exp_avg_sq"], v)
        size, spread = lr / (1 - betas[0] ** step), (1 - betas[1] ** step).sqrt()
        change = m / v.sqrt().div_(spread).add_(eps)
        new["param"] = old["param"].mul(1 - lr * weight_decay).sub_(change.mul_(size))
        write(row, new, clip)


def adamw(
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
    """One step of AdamW for every row of `lists`, whose tensors are overwritten, but for "grad".

    lists  columns param and grad, of one dtype; exp_avg, exp_avg_sq and step (), float32 (float64
           for float64 parameters); max_exp_avg_sq for amsgrad, and master, the float32 values of
           which parameters in bfloat16 or float16 are copies
    clip   grad_norm's result, or None: gradients as they are
    lr     a number, or a tensor of one on the parameters' device
    """
    args = (lists, clip, lr, betas, eps, weight_decay, maximize)
    chosen = ADAMW.select(*args, backend=backend)
    if chosen == "torch":
        adamw_reference(*args)
    else:
        on_device_of(lists.first, ADAMW.modules[chosen].update, *args)
        torch.autograd.graph.increment_version(lists.columns["param"])


def _arguments(lists, clip=None, *, lr, betas, eps, weight_decay, maximize=False):
    return lists, clip, lr, betas, eps, weight_decay, maximize


# Order: triton alone computes on CUDA tensors, cpu on the others.
ADAMW = Update("adamw", order=("triton", "cpu"), arguments=_arguments)
