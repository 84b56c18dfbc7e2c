"""Cross-entropy of logits with class labels or probabilities, and what is added to it in training:
label smoothing (Szegedy et al. 2016), z-loss (de Brebisson and Vincent 2016), logit softcap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, kernel_op, needs_gradient
from slimkernels.ops._checks import (
    autocast_device,
    check_flag,
    check_parameter,
    check_tensor,
    is_under_autocast,
)
from slimkernels.ops._first_order import first_order
from slimkernels.ops._loss_arguments import check_label_range, check_labels, check_loss_options


def cross_entropy_reference(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The definition: the loss, and lse (M,). In float32, or in float64 if x is.

    x (M, V), target (M,) or (M, V); without z_loss and softcap this is torch's cross_entropy.
    """
    M, V = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    classes = x.new_ones(V, dtype=wide) if weight is None else weight.to(wide)
    has_labels = not target.is_floating_point()
    kept = target != ignore_index if has_labels else x.new_ones(M, dtype=torch.bool)
    # Ignored logits are not only left out: infinite ones would make NaN of their gradient of 0.
    logits = x.where(kept.unsqueeze(1), 0).to(wide)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    log_p, lse = torch.log_softmax(logits, -1), torch.logsumexp(logits, -1)
    if has_labels:
        labels = target.where(kept, 0)
        rows = classes[labels].where(kept, 0)
        loss = -log_p.gather(1, labels.unsqueeze(1)).squeeze(1) * rows
        if label_smoothing > 0:  # not by a factor of 0, which turns an infinite logit into NaN
            loss = (1 - label_smoothing) * loss - label_smoothing * (log_p * classes).mean(-1)
    else:
        rows = x.new_ones(M, dtype=wide)
        shares = (1 - label_smoothing) * target.to(wide) + label_smoothing / V
        loss = -(log_p * shares * classes).sum(-1)
    if z_loss > 0:
        loss = loss + z_loss * rows * lse.square()
    loss = loss.where(kept, 0)
    if reduction == "mean":
        loss = loss.sum() / rows.sum()
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(x.dtype), lse.where(kept, 0)


def is_correct(x: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The definition of what return_correct adds: (M,) bool, of logits and labels."""
    return (x.argmax(-1) == target) & (target != ignore_index)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """-log softmax(input)[target], averaged over the rows whose target is not ignore_index.

    input            logits (M, V), (V,) or (M, V, d1, ...): float32, float16, bfloat16, float64
    target           class labels, int64 or int32: input's shape without V; or a probability of
                     each class: input's shape, in its dtype or float32
    weight           (V,), what each class counts; a constant, so it may not require a gradient
    ignore_index     rows with this label have loss and gradient 0, whatever their logits
    reduction        "none" (the shape of labels), "sum", or "mean", which divides by the sum of
                     the labels' weights over the rows not ignored; by the rows for probabilities
    label_smoothing  in [0, 1]: this share of a row's target is spread evenly over all V classes
    z_loss           adds z_loss * lse^2 to a row's loss, times its label's weight
    softcap          the logits become softcap * tanh(input / softcap) first
    return_lse       also return lse, log(sum(exp(logits))), through which gradients flow
    return_correct   also return which labels are their row's argmax, from the same pass; class
                     labels only. Accuracy is correct.sum() / (target != ignore_index).sum().
    Returns          input's dtype, rounded once from float32 (float64 for float64); under autocast
                     float32, as in torch. The mean of no rows is NaN, as in torch.
                     With return_lse or return_correct a tuple, (loss, lse), (loss, correct) or
                     (loss, lse, correct): lse in float32 (float64), the shape of labels, 0 in
                     ignored rows; correct in bool, the shape of labels, False in ignored rows. As
                     in torch.argmax, of equal logits the first counts, and NaN is the greatest;
                     softcap and weight do not matter.
    Saves            input, target, weight and three float32 a row; the softmax is not stored
    Errors           ValueError naming the argument that is wrong. A label out of range is one too
                     on the CPU; on a GPU, where looking would cost a synchronisation, its row's
                     loss and gradient are NaN. In compiled code the same where a kernel runs; where
                     the backend is "torch" its own error, which ends the process if it comes in one
                     of Inductor's threads, as that of torch's cross_entropy does.
    """
    args = _arguments(
        *(input, target, weight),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        return_lse=return_lse,
        return_correct=return_correct,
    )
    chosen = CROSS_ENTROPY.select(*args, backend=backend)
    if chosen == "torch":
        results = _by_torch(*args, return_lse)
    elif needs_gradient(input):
        results = _CrossEntropy.apply(*args, return_lse, chosen)
    else:
        loss, stats, _, correct = cross_entropy_forward(*args, chosen)
        results = _asked_for(args[0], loss, stats, correct, return_lse, return_correct)
    if input.dim() == 2:
        return results
    rows = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
    if isinstance(results, Tensor):
        return results.view(rows) if reduction == "none" else results
    loss, *others = results
    loss = loss.view(rows) if reduction == "none" else loss
    return loss, *(t.view(rows) for t in others)


def _by_torch(
    x,
    target,
    weight,
    ignore_index,
    reduction,
    label_smoothing,
    z_loss,
    softcap,
    return_correct,
    return_lse,
):
    """The definition in torch's fused kernels where they know it all, as eager code would."""
    how = ignore_index, reduction, label_smoothing
    correct = (is_correct(x, target, ignore_index),) if return_correct else ()
    x = x.float() if is_under_autocast(x) else x
    with torch.autocast(autocast_device(x), enabled=False):  # which has its own idea of some parts
        if z_loss > 0 or softcap > 0 or return_lse:
            loss, lse = cross_entropy_reference(x, target, weight, *how, z_loss, softcap)
            others = *((lse,) if return_lse else ()), *correct
            return (loss, *others) if others else loss
        if target.is_floating_point():
            target = target.to(x.dtype)
        else:  # torch makes NaN of 0 * NaN
            x = x.masked_fill((target == ignore_index).unsqueeze(1), 0.0)
        weight = None if weight is None else weight.to(x.dtype)
        loss = F.cross_entropy(
            *(x, target, weight),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
        return (loss, *correct) if correct else loss


def _arguments(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    return_lse=False,
    return_correct=False,
):
    check_tensor("cross_entropy", "input", input)
    if input.dim() == 0:
        raise ValueError("cross_entropy: input must have a dimension of classes; got shape ()")
    rank = input.dim()
    x = input if rank == 2 else input.unsqueeze(0) if rank == 1 else input.movedim(1, -1)
    V = x.shape[-1]
    check_loss_options("cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap)
    check_flag("cross_entropy", "return_lse", return_lse)
    check_flag("cross_entropy", "return_correct", return_correct)
    if isinstance(target, Tensor) and target.is_floating_point():
        if return_correct:
            raise ValueError(
                "cross_entropy: return_correct must be False where target holds probabilities; "
                "got True"
            )
        _check_probabilities(target, input, ignore_index)
        target = target.unsqueeze(0) if input.dim() == 1 else target.movedim(1, -1)
        target = target.reshape(-1, V)
    else:
        expected = tuple(x.shape[:-1]) if input.dim() > 1 else ()
        whose = f"that of input {tuple(input.shape)} without its classes"
        check_labels("cross_entropy", target, expected, whose, input.device)
    if V == 0:
        raise ValueError(f"cross_entropy: input {tuple(input.shape)} has no classes")
    _check_weight(weight, input, V)
    if not target.is_floating_point():
        check_label_range("cross_entropy", target, V, ignore_index)
        target = target if rank == 2 else target.reshape(-1)
        target = target if target.dtype == torch.int64 else target.to(torch.int64)
    softcap = 0.0 if softcap is None else softcap
    x = x if rank == 2 else x.reshape(-1, V)
    options = ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
    return x, target, weight, *options


def _check_probabilities(target, input, ignore_index):
    if target.shape != input.shape:
        raise ValueError(
            f"cross_entropy: target, of probabilities, must have input's shape "
            f"{tuple(input.shape)}; got {tuple(target.shape)}"
        )
    if target.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"cross_entropy: target, of probabilities, must be {input.dtype} like input, or "
            f"float32; got {target.dtype}"
        )
    if target.device != input.device:
        raise ValueError(
            f"cross_entropy: target must be on {input.device} like input; got {target.device}"
        )
    if ignore_index >= 0:
        raise ValueError(
            f"cross_entropy: ignore_index must be negative where target holds probabilities; "
            f"got {ignore_index}"
        )


def _check_weight(weight, input, V):
    check_parameter("cross_entropy", "weight", weight, input, V, "the classes")
    if weight is not None and weight.requires_grad:
        raise ValueError("cross_entropy: weight must not require a gradient: it has none")


# Order: triton before cuda until a table of GPU measurements says otherwise.
CROSS_ENTROPY = Op("cross_entropy", order=("triton", "cuda", "cpu"), arguments=_arguments)


def _asked_for(x, loss, stats, correct, return_lse, return_correct):
    """What the public function returns of a kernel's results."""
    loss = loss if is_under_autocast(x) else loss.to(x.dtype)
    if not (return_lse or return_correct):
        return loss
    lse = (stats[0] + stats[1],) if return_lse else ()
    return loss, *lse, *((correct,) if return_correct else ())


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, *options):
        *how, return_correct, return_lse, backend = options
        loss, stats, divisor, correct = cross_entropy_forward(
            x, target, weight, *how, return_correct, backend
        )
        ctx.save_for_backward(x, target, weight, stats, divisor)
        ctx.how, ctx.has_lse = (*how, backend), return_lse
        ctx.set_materialize_grads(False)
        if return_correct:
            ctx.mark_non_differentiable(correct)
        return _asked_for(x, loss, stats, correct, return_lse, return_correct)

    @staticmethod
    @first_order("cross_entropy")
    def backward(ctx, saved, dy, *others):
        dlse = others[0] if ctx.has_lse else None
        if dy is None:  # only lse was used
            per_row = ctx.how[1] == "none"
            dy = dlse.new_zeros(dlse.shape if per_row else ())
        dx = cross_entropy_backward(dy, dlse, *saved, *ctx.how)
        return dx, *(None,) * 10


def _check_compiled(x, target, weight, ignore_index, *_):
    if not target.is_floating_point():
        check_label_range("cross_entropy", target, x.shape[1], ignore_index)


def _forward_fake(x, target, weight, ignore_index, reduction, *how):
    *_, return_correct, _ = how
    rows = x.shape[:1]
    loss = x.new_empty(rows if reduction == "none" else (), dtype=torch.float32)
    stats = x.new_empty((3, *rows), dtype=torch.float32)
    correct = x.new_empty(rows if return_correct else 0, dtype=torch.bool)
    return loss, stats, x.new_empty(1, dtype=torch.float32), correct


@kernel_op("cross_entropy_forward", _forward_fake, _check_compiled)
def cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_correct: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, float32; stats (3, M): a row's maximum, the logarithm of its sum of
    exp(x - maximum), and the mass of what smoothing or probabilities spread over its classes, 0
    without; divisor (1,): what a mean divides by, on the device, so that no one waits for it; for
    "none" anything; correct (M,) bool, empty if it is not asked for.

    lse is the sum of the first two. Rounded to one float32 it would be wrong by 5e-4 at logits of
    1e4, and so would every probability made from it.
    """
    module = CROSS_ENTROPY.modules[backend]
    return module.forward(
        *(x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap),
        return_correct,
    )


def _backward_fake(dy, dlse, x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("cross_entropy_backward", _backward_fake)
def cross_entropy_backward(
    dy: Tensor,
    dlse: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str,
) -> Tensor:
    module = CROSS_ENTROPY.modules[backend]
    return module.backward(
        *(dy, dlse, x, target, weight, stats, divisor),
        *(ignore_index, reduction, label_smoothing, z_loss, softcap),
    )
