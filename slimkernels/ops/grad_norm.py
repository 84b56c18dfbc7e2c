"""The norm of all gradients of an optimizer, and what it makes of the step to come."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import on_device_of
from slimkernels.ops._update import TensorLists, Update


def grad_norm_reference(
    lists: list[TensorLists], max_norm: float | None, skip_nonfinite: bool
) -> Tensor:
    """The definition, computed in float64 if one of the gradients is, else in float32."""
    grads = [grad for each in lists for grad in each.columns["grad"]]
    dtypes = {torch.promote_types(grad.dtype, torch.float32) for grad in grads}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(grad, dtype=dtype) for grad in grads])
    )
    one = torch.ones_like(norm)
    coefficient = one if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    applies = norm.isfinite().to(dtype) if skip_nonfinite else one
    clip = torch.stack([norm, coefficient, applies])
    return clip if dtypes == {torch.float64} else clip.float()  # kernels read float32


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
    Returns         (3,) on the gradients' device, float32, or float64 if all gradients are: the
                    norm, the coefficient of the gradients, and 1 if the step is to be taken, else
                    0. The same bits on every run.
    """
    args = (lists, max_norm, skip_nonfinite)
    chosen = GRAD_NORM.select(*args, backend=backend)
    if chosen == "torch":
        return grad_norm_reference(*args)
    return on_device_of(lists[0].first, GRAD_NORM.modules[chosen].update, *args)


def _arguments(lists, *, max_norm=None, skip_nonfinite=False):
    return lists, max_norm, skip_nonfinite


GRAD_NORM = Update("grad_norm", order=("triton", "cpu"), arguments=_arguments)
