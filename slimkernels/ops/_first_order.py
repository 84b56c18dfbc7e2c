"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def first_order(op: str) -> Callable[[Callable], Callable]:
    """Of an autograd Function's ``backward(ctx, saved, *dys)``: a second derivative is an error.

    saved  ctx.saved_tensors, read here and only once: under torch.utils.checkpoint a second reading
           is an error

    Where the gradients themselves are recorded (create_graph=True) they hang on everything that
    they are made of, and raise when somebody differentiates them. torch's once_differentiable does
    so only where dy requires a gradient; otherwise its gradients are constants, and a penalty on
    them silently adds nothing.
    """

    def decorate(backward: Callable) -> Callable:
        def recorded(ctx, saved, *dys):
            # A compiled backward is recorded as a whole, and torch.compile's own autograd refuses a
            # second; its backend="eager", for debugging, says nothing.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, saved, *dys)
            with torch.no_grad():
                gradients = backward(ctx, saved, *dys)
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            return _NotAgain.apply(op, gradients, *dys, *saved)

        @functools.wraps(backward)
        def run(ctx, *dys):
            saved = ctx.saved_tensors
            if torch.compiler.is_compiling() or not any(map(_is_wrapped, dys)):
                return recorded(ctx, saved, *dys)
            try:
                return recorded(ctx, saved, *dys)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{op}: a kernel's gradient cannot be vectorised or transformed by torch.func; "
                    f'that of the same call inside use_backend("torch") can'
                ) from error

        return run

    return decorate


def _is_wrapped(dy: Tensor | None) -> bool:
    """Whether a tensor is one of torch.func's, which has no memory of its own."""
    if dy is None:
        return False
    functorch = torch._C._functorch
    # autograd's own vectorising, is_grads_batched, makes the legacy kind.
    return functorch.is_functorch_wrapped_tensor(dy) or functorch.is_legacy_batchedtensor(dy)


class _NotAgain(torch.autograd.Function):
    """`gradients`, as a function of `sources` that has no derivative."""

    @staticmethod
    def forward(ctx, op: str, gradients: tuple[Tensor | None, ...], *sources: Tensor | None):
        ctx.op = op
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: a kernel cannot be differentiated twice; the same call inside "
            f'use_backend("torch") can'
        )
