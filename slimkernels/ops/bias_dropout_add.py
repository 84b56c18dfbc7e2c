"""The end of a sublayer in one pass: residual + dropout(input + bias)."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._activation import check_bias
from slimkernels.ops._checks import check_alike, check_dropout, check_tensor, promoted
from slimkernels.ops._dropout import draw_seed, dropped
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import is_torchs_own, remember
from slimkernels.ops.layer_norm import gradient_of


def bias_dropout_add_reference(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """The definition, in float32, or in float64 if x is, rounded once."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y if bias is None else y + bias
    y = y if seed is None else dropped(y, seed, dropout_p)
    y = y if residual is None else residual + y
    return y.clone() if y is x else y.to(x.dtype)


def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """residual + dropout(input + bias), without storing the dropout.

    input      (..., N) float32, float16, bfloat16 or float64
    bias       (N,), in input's dtype or float32, of the linear layer that made input; or None
    residual   input's shape, dtype and device; or None, for dropout(input + bias). Under autocast
               another dtype will do: both are computed in the wider one, as torch adds them
    dropout_p  probability of dropping an element, in [0, 1); survivors are multiplied by
               1 / (1 - dropout_p). Pass 0 outside training.
    Returns    input's shape and dtype (residual's where that is wider); computed in float32
               (float64 for float64) and rounded once; without dropout the backend "torch" rounds
               each sum, as eager does
    Saves      bias and the seed of the dropout
    Errors     ValueError naming the argument whose value, shape, dtype or device is wrong
    """
    call = (input, bias, residual), ("bias_dropout_add", dropout_p, backend)
    if is_torchs_own(call):
        return _by_torch(input, bias, residual)
    x, bias, residual, _ = args = _arguments(input, bias, residual, dropout_p)
    chosen = BIAS_DROPOUT_ADD.select(*args, backend=backend)
    seed = draw_seed(x.device) if dropout_p > 0 else None
    if chosen == "torch" and seed is None:
        if backend is None and x is input:
            remember(call)
        return _by_torch(x, bias, residual)
    if chosen == "torch":
        return bias_dropout_add_reference(*args, seed)
    if needs_gradient(x, bias, residual):
        return _BiasDropoutAdd.apply(*distinct(*args), seed, chosen)
    return bias_dropout_add_forward(*args, seed, chosen)


def _by_torch(x, bias, residual):
    """What eager code would call."""
    y = x if bias is None else x + bias
    y = y if residual is None else residual + y
    return y.clone() if y is x else y if y.dtype == x.dtype else y.to(x.dtype)


def _arguments(input, bias=None, residual=None, dropout_p=0.0):
    op = "bias_dropout_add"
    check_tensor(op, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have at least one dimension; got shape ()")
    check_bias(op, bias, input)
    if residual is not None:
        narrow = input.dtype
        input, residual = promoted(input, residual)
        check_alike(op, "residual", residual, input)
        if bias is not None and input.dtype != narrow:
            bias = bias.to(input.dtype)
    check_dropout(op, dropout_p)
    return input, bias, residual, dropout_p


# Order: triton before cuda until a table of GPU measurements says otherwise.
BIAS_DROPOUT_ADD = Op("bias_dropout_add", order=("triton", "cuda", "cpu"), arguments=_arguments)


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, dropout_p, seed, backend):
        ctx.save_for_backward(bias, seed)
        ctx.has_residual = residual is not None
        ctx.dropout_p = dropout_p
        ctx.backend = backend
        return bias_dropout_add_forward(x, bias, residual, dropout_p, seed, backend)

    @staticmethod
    @first_order("bias_dropout_add")
    def backward(ctx, saved, dy):
        bias, seed = saved
        bias = bias if ctx.needs_input_grad[1] else None
        dx, dbias = dy, None
        if bias is not None or seed is not None:
            dx, dbias = bias_dropout_add_backward(dy, bias, ctx.dropout_p, seed, ctx.backend)
        dx = dy if seed is None else dx
        dbias = None if bias is None else dbias
        return dx, dbias, dy if ctx.has_residual else None, None, None, None


def _forward_fake(x, bias, residual, dropout_p, seed, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@kernel_op("bias_dropout_add_forward", _forward_fake)
def bias_dropout_add_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> Tensor:
    return BIAS_DROPOUT_ADD.modules[backend].forward(x, bias, residual, dropout_p, seed)


def _backward_fake(dy, bias, dropout_p, seed, backend):
    # Without dropout dx is dy, which autograd has; the op's own is then empty.
    like = torch.empty_like(dy, memory_format=torch.contiguous_format)
    return dy.new_empty(0) if seed is None else like, gradient_of(bias, dy)


@kernel_op("bias_dropout_add_backward", _backward_fake)
def bias_dropout_add_backward(
    dy: Tensor, bias: Tensor | None, dropout_p: float, seed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return BIAS_DROPOUT_ADD.modules[backend].backward(dy, bias, dropout_p, seed)
