"""The norm of all gradients of an optimizer, and what it makes of the step to come."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import on_device_of
from slimkernels.ops._update import TensorLists, Update


def grad_norm_reference(
    lists: list[TensorLists], max_norm: float | None, skip_nonfinite: bool
) -> Tensor:
    """The definition, in float32, or in float64 if the gradients are."""
    grads = [grad for each in lists for grad in each.columns["grad"]]
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(grad, dtype=dtype) for grad in grads])
    )
    one = torch.ones_like(norm)
    coefficient = one if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    applies = norm.isfinite().to(dtype) if skip_nonfinite else one
    return torch.stack([norm, coefficient, applies])


def grad_norm(
    lists: list[TensorLists],
    *,
    max_norm: float | None = None,
    skip_nonfinite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The 2-norm of all gradients together, and how an update shall enter them; no waiting.

    lists           tensors on one device; of each the column "grad" is read
    max_norm        longer gradients are scaled to it, as torch.nn.utils.clip_grad_norm_ does
    skip_nonfinite  a step whose norm is NaN or infinite is not to be taken
    Returns         (3,) float32 on the gradients' device: the norm, the coefficient of the
                    gradients, and 1 if the step is to be taken, else 0. The same bits on every run.
    """
    args = (lists, max_norm, skip_nonfinite)
    chosen = GRAD_NORM.select(*args, backend=backend)
    if chosen == "torch":
        return grad_norm_reference(*args)
    return on_device_of(lists[0].first, GRAD_NORM.modules[chosen].update, *args)


def _arguments(lists, *, max_norm=None, skip_nonfinite=False):
    return lists, max_norm, skip_nonfinite


GRAD_NORM = Update("grad_norm", order=("triton", "cpu"), arguments=_arguments)
