"""Cross-entropy of logits with class labels, with label smoothing (Szegedy et al. 2016)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, kernel_op, needs_gradient
from slimkernels.ops._checks import autocast_device, check_integer, check_number, check_tensor
from slimkernels.ops._first_order import first_order

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy_reference(
    x: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> Tensor:
    """The definition. x (M, V), target (M,); in float32, or in float64 if x is."""
    kept = target != ignore_index
    # Ignored logits are not only left out: infinite ones would make NaN of their gradient of 0.
    logits = x.where(kept.unsqueeze(1), 0).to(torch.promote_types(x.dtype, torch.float32))
    log_p = torch.log_softmax(logits, -1)
    loss = -log_p.gather(1, target.where(kept, 0).unsqueeze(1)).squeeze(1)
    if label_smoothing > 0:  # not by a factor of 0, which turns an infinite logit into NaN
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(-1)
    loss = loss.where(kept, 0)
    if reduction == "mean":
        loss = loss.sum() / kept.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(x.dtype)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """-log softmax(input)[target], averaged over the rows whose target is not ignore_index.

    input            logits (M, V), (V,) or (M, V, d1, ...): float32, float16, bfloat16, float64
    target           class labels, int64 or int32: input's shape without V
    ignore_index     rows with this label have loss and gradient 0, whatever their logits
    reduction        "none" (target's shape), "mean" over the rows not ignored, or "sum"
    label_smoothing  in [0, 1]: this share of a row's target is spread evenly over all V classes
    Returns          input's dtype; computed in float32 (float64 for float64) and rounded once.
                     The mean of no rows is NaN, as in torch.
    Saves            input, target and a row's log-sum-exp (two float32); the softmax is not stored
    Errors           ValueError naming the argument that is wrong. A label out of range is one too
                     on the CPU; on a GPU and in compiled code, where looking would cost a
                     synchronisation, its row's loss and gradient are NaN.
    """
    args = _arguments(
        input,
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    chosen = CROSS_ENTROPY.select(*args, backend=backend)
    if chosen == "torch":
        loss = _by_torch(*args)
    elif needs_gradient(input):
        loss = _CrossEntropy.apply(*args, chosen)
    else:
        loss = cross_entropy_forward(*args, chosen)[0]
    return loss.view(target.shape) if reduction == "none" else loss


def _by_torch(x, target, ignore_index, reduction, label_smoothing):
    """The definition in torch's fused kernels, which is what eager code would call."""
    x = x.masked_fill((target == ignore_index).unsqueeze(1), 0.0)  # torch makes NaN of 0 * NaN
    with torch.autocast(autocast_device(x), enabled=False):  # which would return float32
        return F.cross_entropy(
            x,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )


def _arguments(input, target, *, ignore_index=-100, reduction="mean", label_smoothing=0.0):
    check_tensor("cross_entropy", "input", input)
    if not isinstance(target, Tensor):
        raise ValueError(f"cross_entropy: target must be a tensor; got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"cross_entropy: target must hold class labels, int64 or int32; got {target.dtype}"
        )
    if input.dim() == 0:
        raise ValueError("cross_entropy: input must have a dimension of classes; got shape ()")
    x = input.unsqueeze(0) if input.dim() == 1 else input.movedim(1, -1)
    expected = tuple(x.shape[:-1]) if input.dim() > 1 else ()
    if tuple(target.shape) != expected:
        raise ValueError(
            f"cross_entropy: target must have shape {expected}, that of input "
            f"{tuple(input.shape)} without its classes; got {tuple(target.shape)}"
        )
    if target.device != input.device:
        raise ValueError(
            f"cross_entropy: target must be on {input.device} like input; got {target.device}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"cross_entropy: reduction must be 'none', 'mean' or 'sum'; got {reduction!r}"
        )
    check_integer("cross_entropy", "ignore_index", ignore_index)
    check_number("cross_entropy", "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing must be in [0, 1]; got {label_smoothing}")
    if x.shape[-1] == 0:
        raise ValueError(f"cross_entropy: input {tuple(input.shape)} has no classes")
    _check_labels(target, x.shape[-1], ignore_index)
    x = x.reshape(-1, x.shape[-1])
    return x, target.reshape(-1).to(torch.int64), ignore_index, reduction, label_smoothing


def _check_labels(target, V, ignore_index):
    """Where reading the labels costs nothing: not on a GPU, not while compiling."""
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = ((target < 0) | (target >= V)) & (target != ignore_index)
    if not wrong.any():
        return
    position = tuple(wrong.nonzero()[0].tolist())
    raise ValueError(
        f"cross_entropy: target must be in [0, {V}) or ignore_index {ignore_index}; "
        f"got {int(target[position])} at position {position}"
    )


# Order: triton before cuda until a table of GPU measurements says otherwise.
CROSS_ENTROPY = Op("cross_entropy", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, ignore_index, reduction, label_smoothing, backend):
        how = ignore_index, reduction, label_smoothing, backend
        loss, lse, count = cross_entropy_forward(x, target, *how)
        ctx.save_for_backward(x, target, lse, count)
        ctx.how = how
        return loss

    @staticmethod
    @first_order("cross_entropy")
    def backward(ctx, saved, dy):
        dx = cross_entropy_backward(dy, *saved, *ctx.how)
        return dx, None, None, None, None, None


def _forward_fake(x, target, ignore_index, reduction, label_smoothing, backend):
    loss = x.new_empty(target.shape if reduction == "none" else ())
    lse = x.new_empty((2, *target.shape), dtype=torch.float32)
    return loss, lse, x.new_empty(1, dtype=torch.float32)


@kernel_op("cross_entropy_forward", _forward_fake)
def cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; lse (2, M): a row's maximum, and the logarithm of its sum of exp(x - maximum);
    count (1,): how many rows are not ignored, on the device, so that no one waits for it.

    lse is the sum of the two parts. Rounded to one float32 it would be wrong by 5e-4 at logits of
    1e4, and so would every probability made from it.
    """
    module = CROSS_ENTROPY.modules[backend]
    return module.forward(x, target, ignore_index, reduction, label_smoothing)


def _backward_fake(dy, x, target, lse, count, ignore_index, reduction, label_smoothing, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("cross_entropy_backward", _backward_fake)
def cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    lse: Tensor,
    count: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    backend: str,
) -> Tensor:
    module = CROSS_ENTROPY.modules[backend]
    return module.backward(dy, x, target, lse, count, ignore_index, reduction, label_smoothing)
