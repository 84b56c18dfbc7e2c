"""SiLU in CUDA C++."""

from slimkernels.backends.cuda import _activation
from slimkernels.backends.cuda._common import unsupported_tensor


def unsupported(x, bias, curve):
    return unsupported_tensor(x)


def forward(x, bias, curve):
    return _activation.forward(x, bias, curve)


def backward(dy, x, bias, curve):
    return _activation.backward(dy, x, bias, curve)
