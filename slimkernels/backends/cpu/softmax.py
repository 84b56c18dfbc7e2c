"""Softmax on the CPU: csrc/cpu/softmax.cpp and softmax_columns.cpp."""

from slimkernels.backends.cpu._common import unsupported_tensor
from slimkernels.backends.cpu._softmax import gradients_of, softmax_of

# Elements below which ATen's softmax is the faster where nothing is scaled or masked, since a call
# of it costs less. Its time over ours, forward and with backward, an Intel Xeon with AMX, one
# thread, float32: 0.39 and 0.46 at 64x64, 0.91 and 0.63 at 256x128, 1.06 and 0.71 at 512x128, 1.12
# and 0.84 at 2048x128, 1.07 and 0.95 at 4096x128 (in bfloat16 0.42 and 0.49, 0.98 and 0.65, 1.10
# and 0.82, 1.14 and 0.95, 1.27 and 1.15).
MIN_PLAIN = 1 << 18


def unsupported(x, dim, scale, mask, is_causal, sinks, dropout_p):
    reason = unsupported_tensor(x)
    is_plain = mask is None and sinks is None and scale == 1 and not is_causal and dropout_p == 0
    if reason is None and is_plain and x.numel() < MIN_PLAIN:
        return (
            f"ATen's softmax is faster below {MIN_PLAIN} elements without scale or mask, "
            f"and input has {x.numel()}"
        )
    return reason


def forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    return softmax_of(x, dim, scale, mask, is_causal, sinks, dropout_p, seed)


def backward(dy, y, shares, dim, scale, dropout_p, seed):
    return gradients_of(dy, y, dim, scale, shares, dropout_p, seed)
