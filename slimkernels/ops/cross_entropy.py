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
    check_integer,
    check_number,
    check_tensor,
    is_readable,
    value_range,
)
from slimkernels.ops._first_order import first_order

REDUCTIONS = ("none", "mean", "sum")


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
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
    Returns          input's dtype; computed in float32 (float64 for float64) and rounded once.
                     The mean of no rows is NaN, as in torch. With return_lse, (loss, lse): lse in
                     float32 (float64), the shape of labels, 0 in ignored rows.
    Saves            input, target, weight and three float32 a row; the softmax is not stored
    Errors           ValueError naming the argument that is wrong. A label out of range is one too
                     on the CPU; on a GPU and in compiled code, where looking would cost a
                     synchronisation, its row's loss and gradient are NaN.
    """
    args = _arguments(
        *(input, target, weight),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        return_lse=return_lse,
    )
    chosen = CROSS_ENTROPY.select(*args, backend=backend)
    if chosen == "torch":
        loss, lse = _by_torch(*args, return_lse)
    elif needs_gradient(input):
        results = _CrossEntropy.apply(*args, return_lse, chosen)
        loss, lse = results if return_lse else (results, None)
    else:
        loss, stats, _ = cross_entropy_forward(*args, chosen)
        lse = _lse_of(stats) if return_lse else None
    if input.dim() != 2:
        rows = (*input.shape[:1], *input.shape[2:]) if input.dim() > 1 else ()
        loss = loss.view(rows) if reduction == "none" else loss
        lse = lse.view(rows) if return_lse else None
    return (loss, lse) if return_lse else loss


def _by_torch(x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, lse):
    """The definition in torch's fused kernels where they know it all, as eager code would."""
    how = ignore_index, reduction, label_smoothing
    with torch.autocast(autocast_device(x), enabled=False):  # which would return float32
        if z_loss > 0 or softcap > 0 or lse:
            return cross_entropy_reference(x, target, weight, *how, z_loss, softcap)
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
        return loss, None


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
):
    check_tensor("cross_entropy", "input", input)
    if input.dim() == 0:
        raise ValueError("cross_entropy: input must have a dimension of classes; got shape ()")
    rank = input.dim()
    x = input if rank == 2 else input.unsqueeze(0) if rank == 1 else input.movedim(1, -1)
    V = x.shape[-1]
    check_loss_options("cross_entropy", ignore_index, reduction, label_smoothing, z_loss, softcap)
    check_flag("cross_entropy", "return_lse", return_lse)
    if isinstance(target, Tensor) and target.is_floating_point():
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
    return x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap


def check_loss_options(op, ignore_index, reduction, label_smoothing, z_loss, softcap):
    """What cross_entropy and linear_cross_entropy take besides tensors."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'none', 'mean' or 'sum'; got {reduction!r}")
    check_integer(op, "ignore_index", ignore_index)
    check_number(op, "label_smoothing", label_smoothing)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1]; got {label_smoothing}")
    check_number(op, "z_loss", z_loss)
    if z_loss < 0.0:
        raise ValueError(f"{op}: z_loss must be at least 0; got {z_loss}")
    if softcap is not None:
        check_number(op, "softcap", softcap)
        if softcap <= 0.0:
            raise ValueError(f"{op}: softcap must be None or above 0; got {softcap}")


def check_labels(op, target, shape, whose, device):
    """`target` holds class labels, in a shape and on a device."""
    if not isinstance(target, Tensor):
        raise ValueError(f"{op}: target must be a tensor; got {type(target).__name__}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: target must hold class labels, int64 or int32; got {target.dtype}")
    if tuple(target.shape) != shape:
        raise ValueError(
            f"{op}: target must have shape {shape}, {whose}; got {tuple(target.shape)}"
        )
    if target.device != device:
        raise ValueError(f"{op}: target must be on {device} like input; got {target.device}")


def check_label_range(op, target, V, ignore_index):
    """Where reading the labels costs nothing: not on a GPU, not while compiling."""
    if not is_readable(target) or target.numel() == 0:
        return
    low, high = value_range(target)
    if low >= 0 and high < V:  # the common case, in one pass over the labels
        return
    wrong = ((target < 0) | (target >= V)) & (target != ignore_index)
    if not wrong.any():
        return
    position = tuple(wrong.nonzero()[0].tolist())
    raise ValueError(
        f"{op}: target must be in [0, {V}) or ignore_index {ignore_index}; "
        f"got {int(target[position])} at position {position}"
    )


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
    if weight is None:
        return
    check_tensor("cross_entropy", "weight", weight)
    if tuple(weight.shape) != (V,):
        raise ValueError(
            f"cross_entropy: weight must have shape ({V},), the classes of input "
            f"{tuple(input.shape)}; got {tuple(weight.shape)}"
        )
    if weight.device != input.device:
        raise ValueError(
            f"cross_entropy: weight must be on {input.device} like input; got {weight.device}"
        )
    if weight.dtype not in (input.dtype, torch.float32):
        raise ValueError(
            f"cross_entropy: weight must be {input.dtype} like input, or float32; "
            f"got {weight.dtype}"
        )
    if weight.requires_grad:
        raise ValueError("cross_entropy: weight must not require a gradient: it has none")


# Order: triton before cuda until a table of GPU measurements says otherwise.
CROSS_ENTROPY = Op("cross_entropy", order=("triton", "cuda", "cpu"), arguments=_arguments)


def _lse_of(stats):
    return stats[0] + stats[1]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, *options):
        *how, return_lse, backend = options
        loss, stats, divisor = cross_entropy_forward(x, target, weight, *how, backend)
        ctx.save_for_backward(x, target, weight, stats, divisor)
        ctx.how = *how, backend
        ctx.set_materialize_grads(False)
        return (loss, _lse_of(stats)) if return_lse else loss

    @staticmethod
    @first_order("cross_entropy")
    def backward(ctx, saved, dy, dlse=None):
        if dy is None:  # only lse was used
            per_row = ctx.how[1] == "none"
            dy = dlse.new_zeros(dlse.shape if per_row else ())
        dx = cross_entropy_backward(dy, dlse, *saved, *ctx.how)
        return dx, *(None,) * 9


def _forward_fake(x, target, weight, ignore_index, reduction, *_):
    rows = x.shape[:1]
    loss = x.new_empty(rows if reduction == "none" else ())
    stats = x.new_empty((3, *rows), dtype=torch.float32)
    return loss, stats, x.new_empty(1, dtype=torch.float32)


@kernel_op("cross_entropy_forward", _forward_fake)
def cross_entropy_forward(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; stats (3, M): a row's maximum, the logarithm of its sum of exp(x - maximum), and
    the mass of what smoothing or probabilities spread over its classes, 0 without; divisor (1,):
    what a mean divides by, on the device, so that no one waits for it; for "none" anything.

    lse is the sum of the first two. Rounded to one float32 it would be wrong by 5e-4 at logits of
    1e4, and so would every probability made from it.
    """
    module = CROSS_ENTROPY.modules[backend]
    return module.forward(
        x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap
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
