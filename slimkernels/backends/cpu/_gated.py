"""What swiglu and geglu run on the CPU: csrc/cpu/gated.cpp."""

from slimkernels.backends._gated import empty_gradients, gate_and_up
from slimkernels.backends.cpu._activation import CURVES
from slimkernels.backends.cpu._common import DTYPES, _cpu, pointers, run


def forward(x, gate, curve):
    gate, up = gate_and_up(x, gate)
    M, N = up.shape
    y = x.new_empty((*x.shape[:-1], N))
    run(
        _cpu.gated_forward,
        *pointers(gate, up, y),
        *(M, N, gate.stride(0), up.stride(0), CURVES[curve], DTYPES[x.dtype]),
    )
    return y


def backward(dy, x, gate, curve):
    dy = dy.contiguous()
    dx, dgate, *to = empty_gradients(x, gate)
    gate, up = gate_and_up(x, gate)
    M, N = up.shape
    run(
        _cpu.gated_backward,
        *pointers(dy, gate, up, *to),
        *(M, N, gate.stride(0), up.stride(0), to[0].stride(0), CURVES[curve], DTYPES[x.dtype]),
    )
    return dx, dgate
