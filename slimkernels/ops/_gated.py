"""y = f(gate) * up (Shazeer 2020): what swiglu and geglu share.

gate and up are the halves of one packed tensor, gate first, or two tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import OPS, Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._activation import DEFINITIONS, EAGER
from slimkernels.ops._checks import check_alike, check_tensor, promoted
from slimkernels.ops._first_order import first_order
from slimkernels.ops._known_calls import ANY, chosen_before, remember

_OP_OF = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu"}


def gated_reference(x: Tensor, gate: Tensor | None, curve: str) -> Tensor:
    """The definition, in float32, or in float64 if x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = (t.to(wide) for t in _halves(x, gate))
    return (DEFINITIONS[curve](gate) * up).to(x.dtype)


def _halves(x, gate):
    """gate and up."""
    if gate is not None:
        return gate, x
    N = x.shape[-1] // 2
    return x[..., :N], x[..., N:]


def gated_arguments(op: str, input: object, gate: object, curve: str) -> tuple:
    check_tensor(op, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must have at least one dimension; got shape ()")
    if gate is not None:
        input, gate = promoted(input, gate)
        check_alike(op, "gate", gate, input)
    elif input.shape[-1] % 2:
        raise ValueError(
            f"{op}: input must have an even last dimension, gate and up side by side, where gate "
            f"is not given; got shape {tuple(input.shape)}"
        )
    return input, gate, curve


def multiply(
    op: Op,
    function: type[torch.autograd.Function],
    x: Tensor,
    gate: Tensor | None,
    curve: str,
    backend: str | None,
) -> Tensor:
    """The public call of `op`, whose gradients are `function`'s."""
    args = x, gate, curve
    call = (x, gate), (op.name, curve, backend)
    chosen = chosen_before(call)
    if chosen is None:
        args = x, gate, curve = gated_arguments(op.name, *args)
        chosen = op.select(*args, backend=backend)
        remember(call, chosen, limit=ANY)  # not where autocast has cast one of the two
    if chosen == "torch":
        gate, up = _halves(x, gate)
        return EAGER[curve](gate) * up
    if needs_gradient(x, gate):
        return function.apply(*distinct(*args), chosen)
    return gated_forward(*args, chosen)


class Gated(torch.autograd.Function):
    """Subclassed by each op, whose name its errors bear."""

    @staticmethod
    def forward(ctx, x, gate, curve, backend):
        ctx.save_for_backward(x, gate)
        ctx.curve = curve
        ctx.backend = backend
        return gated_forward(x, gate, curve, backend)

    @staticmethod
    def gradients(ctx, saved, dy):
        x, gate = saved
        dx, dgate = gated_backward(dy, x, gate, ctx.curve, ctx.backend)
        return dx, None if gate is None else dgate, None, None


class SwiGLU(Gated):
    backward = staticmethod(first_order("swiglu")(Gated.gradients))


class GEGLU(Gated):
    backward = staticmethod(first_order("geglu")(Gated.gradients))


def _forward_fake(x, gate, curve, backend):
    N = x.shape[-1] // 2 if gate is None else x.shape[-1]
    return x.new_empty((*x.shape[:-1], N))


@kernel_op("gated_forward", _forward_fake)
def gated_forward(x: Tensor, gate: Tensor | None, curve: str, backend: str) -> Tensor:
    return OPS[_OP_OF[curve]].modules[backend].forward(x, gate, curve)


def _backward_fake(dy, x, gate, curve, backend):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, x.new_empty(0) if gate is None else torch.empty_like(dx)


@kernel_op("gated_backward", _backward_fake)
def gated_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, curve: str, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is packed where x is, and that of gate."""
    return OPS[_OP_OF[curve]].modules[backend].backward(dy, x, gate, curve)
