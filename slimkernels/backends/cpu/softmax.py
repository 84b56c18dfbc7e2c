"""Softmax on the CPU: csrc/cpu/softmax.cpp and softmax_columns.cpp."""

from slimkernels.backends.cpu._common import unsupported_tensor
from slimkernels.backends.cpu._softmax import gradients_of, softmax_of

# Elements below which ATen's softmax is the faster where nothing is scaled or masked, since a call
# of it costs less. Its time over ours, forward and with backward, an Intel Xeon with AMX, one
# thread, float32: 0.39 and 0.46 at 64x64, 0.91 and 0.63 at 256x128, 1.06 and 0.71 at 512x128, 1.12
# and 0.84 at 2048x128, 1.07 and 0.95 at 4096x128 (in bfloat16 0.42 and 0.49, 0.98 and 0.65, 1.10
# and 0.82, 1.14 and 0.95, 1.27 and 1.15).
MIN_PLAIN = 1 << 18
# The same over another dimension, on a busy machine, float32: 0.93 and 0.51 over dim 1 of 8x32x256,
# 1.03 and 0.81 of 8x32x1024, 1.33 and 0.99 of 8x32x4096, 1.32 and 1.16 of 2x4x65536 (in bfloat16
# 0.77 and 0.57, 1.08 and 0.92, 1.29 and 1.16, 1.25 and 1.26).
MIN_COLUMNS = 1 << 20
# And where it is only scaled, which eager does in one more pass: 0.47 and 0.54 at 256x32, 0.80 and
# 0.76 at 1024x64, 1.20 and 1.13 at 4096x64 (in bfloat16 0.60 and 0.55, 1.12 and 0.87, 1.09 and
# 1.06). Of masks, sinks and dropout the definition takes longer than the kernel at every size.
MIN_SCALED = 1 << 17


def unsupported(x, dim, scale, mask, is_causal, sinks, dropout_p):
    if mask is None and sinks is None and not is_causal and dropout_p == 0:
        least = MIN_SCALED if scale != 1 else MIN_PLAIN if dim == -1 else MIN_COLUMNS
        return unsupported_tensor(x) or unsupported_size("softmax", x, least)
    return unsupported_tensor(x)


def unsupported_size(op, x, least):
    """The refusal of calls in which ATen's kernel is all of the work, or almost."""
    if x.numel() < least:
        return (
            f"ATen's {op} is faster below {least} elements without a mask, "
            f"and input has {x.numel()}"
        )
    return None


def forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    return softmax_of(x, dim, scale, mask, is_causal, sinks, dropout_p, seed)


def backward(dy, y, shares, dim, scale, dropout_p, seed):
    return gradients_of(dy, y, dim, scale, shares, dropout_p, seed)
