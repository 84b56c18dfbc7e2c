"""Muon (Jordan 2024) over many matrices at once, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.backends._muon import ratio
from slimkernels.dispatch import on_device_of
from slimkernels.ops._update import TensorLists, Update, widened, write


def newton_schulz(
    matrix: Tensor, coefficients: tuple[float, float, float], eps: float, steps: int
) -> Tensor:
    """Almost the nearest orthogonal matrix: singular values between about 0.7 and 1.2.

    In bfloat16, as Muon is defined, or in float64 if the matrix is.
    """
    a, b, c = coefficients
    x = matrix / matrix.norm().clamp(min=eps)
    x = x if x.dtype == torch.float64 else x.bfloat16()
    if x.shape[0] > x.shape[1]:
        return newton_schulz(matrix.T, coefficients, eps, steps).T
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # rounded once, as is x
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def muon_reference(
    lists: TensorLists,
    clip: Tensor | None,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
) -> None:
    """The definition, in float32 but for the products, or in float64 if the parameters are."""
    for row in lists.rows():
        old = widened(row, clip, maximize=False)
        buffer = old["momentum_buffer"].lerp(old["grad"], 1 - momentum)
        direction = old["grad"].lerp(buffer, momentum) if nesterov else buffer
        direction = newton_schulz(direction, ns_coefficients, eps, ns_steps)
        size = lr * ratio(*direction.shape, adjust_lr_fn)
        param = old["param"] * (1 - lr * weight_decay) - size * direction.to(buffer.dtype)
        write(row, {"momentum_buffer": buffer, "param": param}, clip)


def muon(
    lists: TensorLists,
    clip: Tensor | None = None,
    *,
    lr: float | Tensor,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    eps: float,
    ns_steps: int,
    adjust_lr_fn: str | None,
    backend: str | None = None,
) -> None:
    """One step of Muon for every row of `lists`, whose tensors are overwritten, but for "grad".

    lists  columns param and grad, matrices of one dtype; momentum_buffer, float32 (float64 for
           float64 parameters); and master, the float32 values of which parameters in bfloat16 or
           float16 are copies
    clip   grad_norm's result, or None: gradients as they are
    The others are torch.optim.Muon's.
    """
    args = (lists, clip, lr, weight_decay, momentum, nesterov)
    args += (ns_coefficients, eps, ns_steps, adjust_lr_fn)
    chosen = MUON.select(*args, backend=backend)
    if chosen == "torch":
        muon_reference(*args)
    else:
        on_device_of(lists.first, MUON.modules[chosen].update, *args)
        torch.autograd.graph.increment_version(lists.columns["param"])


def _arguments(lists, clip=None, **options):
    return lists, clip, *(options[name] for name in OPTIONS)


OPTIONS = ("lr", "weight_decay", "momentum", "nesterov")
OPTIONS += ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")

# Order: triton alone computes on CUDA tensors, cpu on the others.
MUON = Update("muon", order=("triton", "cpu"), arguments=_arguments)
