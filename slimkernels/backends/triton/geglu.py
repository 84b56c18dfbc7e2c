"""GEGLU in Triton."""

from slimkernels.backends.triton import _gated
from slimkernels.backends.triton._common import unsupported_tensor


def unsupported(x, gate, curve):
    return unsupported_tensor(x)


def forward(x, gate, curve):
    return _gated.forward(x, gate, curve)


def backward(dy, x, gate, curve):
    return _gated.backward(dy, x, gate, curve)


COMPILES = _gated.compiles("gelu", "gelu_tanh")
