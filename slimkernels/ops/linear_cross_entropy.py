"""Cross-entropy of a linear layer's logits, which are never stored as a whole.

The vocabulary's logits are a language model's largest tensor: 8192 tokens and 128k classes take
2 GiB in bfloat16, and eager PyTorch holds three of them. The same idea in chunks of tokens: Liger
Kernel (Hsu et al. 2024); in tiles, recomputed in backward: Cut Cross-Entropy (Wijmans et al. 2024).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import (
    autocast_device,
    check_flag,
    check_tensor,
    is_under_autocast,
)
from slimkernels.ops._first_order import first_order
from slimkernels.ops._loss_arguments import (
    check_label_range,
    check_labels,
    check_loss_options,
    check_position_range,
    check_positions,
)
from slimkernels.ops.cross_entropy import cross_entropy, cross_entropy_reference


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition. x (N, C), weight (V, C), target (N,); in float32, or in float64 if x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.where((target != ignore_index).unsqueeze(1), 0).to(wide)  # no NaN of an ignored row
    logits = F.linear(x, weight.to(wide), None if bias is None else bias.to(wide))
    how = ignore_index, reduction, label_smoothing, z_loss, softcap
    return cross_entropy_reference(logits, target, None, *how)[0]


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    positions: Tensor | None = None,
    return_correct: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy(input @ weight^T + bias, target) without the (..., V) logits in memory.

    input       (..., C) hidden states: float32, float16, bfloat16 or float64
    weight      (V, C), the vocabulary's matrix, bias (V,): input's dtype or float32; they are
                multiplied in input's dtype (autocast's under autocast) and get their gradients in
                their own. weight may be an embedding's as well.
    target      (...) class labels, int64 or int32; (K,) with positions
    ignore_index, label_smoothing, z_loss, softcap, reduction
                as in cross_entropy. What is not kept is not computed: with all hidden states and a
                target that is ignore_index outside the masked positions, this costs as much as
                the masked positions alone. Which they are is found where the tensors are: on a GPU
                the host does not wait for their number.
    positions   (K,) int64 or int32: the hidden states that count, as rows of input flattened to
                (N, C), in any order. One that stands there twice counts twice, and its gradients
                are added up, always in the same order. The other rows' gradients are 0.
    return_correct
                also return which labels are the argmax of the logits, as in cross_entropy
    Returns     input's dtype, float32 under autocast; a scalar, or target's shape for "none". With
                return_correct a tuple, (loss, correct): correct in bool, target's shape.
    Saves       input, weight, target and three float32 a row, from which backward multiplies again;
                on the CPU, for "mean" and "sum", besides these the gradients of input, weight and
                bias, which forward makes while it has the logits: do not ask for them in evaluation
                (use no_grad), and do not checkpoint the call, which would make them twice
    Errors      ValueError naming the argument that is wrong; labels as in cross_entropy, and
                positions likewise: on a GPU one out of range makes its loss NaN, and with it the
                gradients of weight, bias and another row
    """
    args = _arguments(
        *(input, weight, target, bias),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
        positions=positions,
        return_correct=return_correct,
    )
    chosen = LINEAR_CROSS_ENTROPY.select(*args, backend=backend)
    if chosen == "torch":
        results = _by_torch(*args)
    elif needs_gradient(*args[:4]):
        results = _LinearCrossEntropy.apply(*distinct(*args[:5]), *args[5:], chosen)
    else:
        loss, _, _, correct, *_ = linear_cross_entropy_forward(*args, chosen)
        results = (loss, correct) if return_correct else loss
    loss = results[0] if return_correct else results
    loss = loss.to(torch.float32 if is_under_autocast(input) else input.dtype)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, results[1].view(target.shape)) if return_correct else loss


def _by_torch(
    x,
    weight,
    target,
    bias,
    positions,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    return_correct,
    reduction,
    wanted,
):
    """As eager code would, in its dtypes."""
    x = x if positions is None else x[positions]
    autocast = is_under_autocast(x)
    x = x.masked_fill((target == ignore_index).unsqueeze(1), 0.0)
    with torch.autocast(autocast_device(x), enabled=False):
        bias = None if bias is None else bias.to(x.dtype)
        logits = F.linear(x, weight.to(x.dtype), bias)
        return cross_entropy(
            logits.float() if autocast else logits,
            target,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap or None,
            return_correct=return_correct,
            backend="torch",
        )


def _arguments(
    input,
    weight,
    target,
    bias=None,
    *,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    reduction="mean",
    positions=None,
    return_correct=False,
):
    op = "linear_cross_entropy"
    check_tensor(op, "input", input)
    check_tensor(op, "weight", weight)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have a last dimension; got shape ()")
    C = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != C or weight.shape[0] == 0:
        raise ValueError(
            f"{op}: weight must have shape (V, {C}), V > 0, the last dimension of input "
            f"{tuple(input.shape)}; got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor(op, "bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must have shape {tuple(weight.shape[:1])}, the rows of weight "
                f"{tuple(weight.shape)}; got {tuple(bias.shape)}"
            )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_alike(op, name, parameter, input)
    check_loss_options(op, ignore_index, reduction, label_smoothing, z_loss, softcap)
    check_flag(op, "return_correct", return_correct)
    x = input.reshape(input.shape[:-1].numel(), C)  # not -1, which no features leave open
    if positions is None:
        shape = tuple(input.shape[:-1])
        whose = f"that of input {tuple(input.shape)} without its last dimension"
    else:
        check_positions(op, positions, x)
        shape, whose = tuple(positions.shape), "that of positions"
        positions = positions.to(torch.int64)
    check_labels(op, target, shape, whose, input.device)
    check_label_range(op, target, weight.shape[0], ignore_index)
    if is_under_autocast(x):
        x = x.to(torch.get_autocast_dtype(autocast_device(x)))
    target = target.reshape(-1).to(torch.int64)
    softcap = 0.0 if softcap is None else softcap
    wanted = [_wants_gradient(t) for t in (x, weight, bias)]
    options = ignore_index, label_smoothing, z_loss, softcap, return_correct, reduction, wanted
    return x, weight, target, bias, positions, *options


def _wants_gradient(t):
    return torch.is_grad_enabled() and t is not None and t.requires_grad


def _check_alike(op, name, parameter, input):
    if parameter.device != input.device:
        raise ValueError(
            f"{op}: {name} must be on {input.device} like input; got {parameter.device}"
        )
    converts = torch.is_autocast_enabled(autocast_device(input))
    if parameter.dtype not in (input.dtype, torch.float32) and not converts:
        raise ValueError(
            f"{op}: {name} must be {input.dtype} like input, or float32; got {parameter.dtype}"
        )


# Order: as cross_entropy's.
LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", order=("triton", "cpu"), arguments=_arguments)


def in_forward(reduction: str, backend: str) -> bool:
    """Whether forward makes the gradients. On the CPU the logits' product is what costs, so it is
    not repeated; for "none" what flows into each row is not known before backward."""
    return backend == "cpu" and reduction != "none"


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, positions, *options):
        *how, return_correct, reduction, wanted, backend = options
        loss, stats, divisor, correct, *gradients = linear_cross_entropy_forward(
            x, weight, target, bias, positions, *options
        )
        ctx.options, ctx.gradients = (*how, reduction, wanted, backend), None
        saved = x, weight, target, bias, positions, stats, divisor
        if in_forward(reduction, backend):
            if torch.compiler.is_compiling():
                saved = gradients
            else:  # Not saved but owned: backward may scale them where they are and give them away.
                ctx.gradients = gradients
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        if not return_correct:
            return loss
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx, saved, dy, *_):
        *_, reduction, wanted, backend = ctx.options
        gradients, ctx.gradients = ctx.gradients, None
        gradients = None if gradients is None else _scaled(gradients, dy)
        if gradients is None and in_forward(reduction, backend) and torch.compiler.is_compiling():
            gradients = [_times(g, dy) for g in saved]
        elif gradients is None:  # also of a graph that was retained, and where dy is not finite
            gradients = linear_cross_entropy_backward(dy, *saved, *ctx.options)
        dx, dweight, dbias = (g if w else None for g, w in zip(gradients, wanted, strict=True))
        return dx, dweight, None, dbias, None, *(None,) * (len(ctx.options) + 1)


def _scaled(gradients: list[Tensor], dy: Tensor) -> list[Tensor] | None:
    """Those of forward times dy; None where dy would make NaN of ignored rows' zeros."""
    try:
        scale = dy.item()
    except RuntimeError:  # several gradients at once (vmap): forward's stay as they are
        return [_times(g, dy) for g in gradients]
    if not math.isfinite(scale):
        return None
    return gradients if scale == 1.0 else [g.mul_(dy) for g in gradients]


def _times(gradient: Tensor, dy: Tensor) -> Tensor:
    """gradient * dy, and 0 where an ignored row has it, whatever dy is."""
    return torch.where(gradient == 0, gradient, gradient * dy)


def _gradients_fake(x, weight, bias, wanted):
    def like(t, is_wanted):
        if t is None or not is_wanted:
            return x.new_empty(0)
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return tuple(like(t, w) for t, w in zip((x, weight, bias), wanted, strict=True))


def _check_compiled(x, weight, target, bias, positions, ignore_index, *_):
    check_label_range("linear_cross_entropy", target, weight.shape[0], ignore_index)
    if positions is not None:
        check_position_range("linear_cross_entropy", positions, x.shape[0])


def _forward_fake(x, weight, target, bias, positions, *options):
    *_, return_correct, reduction, wanted, backend = options
    N = target.shape[0]
    wanted = wanted if in_forward(reduction, backend) else [False] * 3
    return (
        x.new_empty((N,) if reduction == "none" else (), dtype=torch.float32),
        x.new_empty((3, N), dtype=torch.float32),
        x.new_empty(1, dtype=torch.float32),
        x.new_empty(N if return_correct else 0, dtype=torch.bool),
        *_gradients_fake(x, weight, bias, wanted),
    )


@kernel_op("linear_cross_entropy_forward", _forward_fake, _check_compiled)
def linear_cross_entropy_forward(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_correct: bool,
    reduction: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, float32; for N targets stats (3, N), divisor (1,) and correct as in
    cross_entropy_forward, stats in an order that is the backend's own; and where in_forward() says
    so the gradients of x, weight and bias for a dy of 1, those that are wanted, else empty tensors.
    """
    module = LINEAR_CROSS_ENTROPY.modules[backend]
    return module.forward(
        *(x, weight, target, bias, positions),
        *(ignore_index, label_smoothing, z_loss, softcap, return_correct, reduction, wanted),
    )


def _backward_fake(dy, x, weight, target, bias, *saved_and_options):
    return _gradients_fake(x, weight, bias, saved_and_options[-2])


@kernel_op("linear_cross_entropy_backward", _backward_fake)
def linear_cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    stats: Tensor,
    divisor: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    reduction: str,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; an empty tensor for each that is not wanted."""
    module = LINEAR_CROSS_ENTROPY.modules[backend]
    return module.backward(
        *(dy, x, weight, target, bias, positions, stats, divisor),
        *(ignore_index, label_smoothing, z_loss, softcap, reduction, wanted),
    )
