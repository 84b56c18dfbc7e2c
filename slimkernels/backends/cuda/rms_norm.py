"""RMSNorm in CUDA C++: csrc/cuda/rms_norm.cu."""

from slimkernels.backends.cuda import _norm
from slimkernels.backends.cuda._common import _cuda


def unsupported(x, weight, eps, zero_centered):
    return _norm.unsupported_norm(x)


def forward(x, weight, eps, zero_centered):
    kernel = _cuda.rms_norm_forward
    y, _, _, rstd = _norm.forward(kernel, x, weight, None, eps, zero_centered, has_mean=False)
    return y, rstd


def backward(dy, x, weight, rstd, zero_centered):
    kernel = _cuda.rms_norm_backward
    _, dx, dweight, _ = _norm.backward(kernel, dy, x, weight, None, None, rstd, zero_centered)
    return dx, dweight
