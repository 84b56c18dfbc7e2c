"""The logarithm of softmax on the CPU: csrc/cpu/softmax.cpp and softmax_columns.cpp."""

from slimkernels.backends.cpu._common import unsupported_tensor
from slimkernels.backends.cpu._softmax import gradients_of, softmax_of
from slimkernels.backends.cpu.softmax import MIN_PLAIN


def unsupported(x, dim, scale, mask, is_causal):
    reason = unsupported_tensor(x)
    if reason is None and mask is None and not is_causal and scale == 1 and x.numel() < MIN_PLAIN:
        return (
            f"ATen's log_softmax is faster below {MIN_PLAIN} elements without scale or mask, "
            f"and input has {x.numel()}"
        )
    return reason


def forward(x, dim, scale, mask, is_causal):
    return softmax_of(x, dim, scale, mask, is_causal, log=True)[0]


def backward(dy, y, dim, scale, hides):
    return gradients_of(dy, y, dim, scale, log=True, hides=hides)[0]
