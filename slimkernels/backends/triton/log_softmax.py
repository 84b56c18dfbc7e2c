"""The logarithm of softmax in Triton: the kernels are in _softmax.py and _softmax_columns.py."""

from slimkernels.backends.triton import _softmax, _softmax_columns
from slimkernels.backends.triton._common import unsupported_tensor
from slimkernels.backends.triton.softmax import LOG_COMPILES as COMPILES


def unsupported(x, dim, scale, mask, is_causal):
    return unsupported_tensor(x) or _softmax.unsupported_row(x, dim)


def forward(x, dim, scale, mask, is_causal):
    if dim == -1:
        return _softmax.softmax_of(x, scale, mask, is_causal, log=True)[0]
    return _softmax_columns.columns_softmax_of(x, scale, mask, log=True)[0]


def backward(dy, y, dim, scale, hides):
    if dim == -1:
        return _softmax.gradients_of(dy, y, scale, log=True, hides=hides)[0]
    return _softmax_columns.columns_gradient_of(dy, y, scale, log=True, hides=hides)


__all__ = ["COMPILES", "backward", "forward", "unsupported"]
