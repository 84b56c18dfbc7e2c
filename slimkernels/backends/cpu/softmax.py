"""Softmax on the CPU: csrc/cpu/softmax.cpp and softmax_columns.cpp."""

import torch

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
# Short rows and narrow columns that ATen is faster at, however many, in log_softmax too. Its time
# over ours at 800 thousand elements, forward and with backward, the same machine, float32: 0.51 and
# 0.42 in rows of 1, 1.51 and 1.62 of 2 (log_softmax 0.58 and 0.77), 0.96 and 1.15 at least of 3.
# From rows of one of its vectors on, ATen has a kernel for rows: 4.61 and 3.85 of 8, 0.50 and 0.58
# of 16, 0.69 and 0.75 of 32, 0.83 and 0.82 of 64, 0.99 and 0.93 of 80 (in bfloat16 3.05 and 3.69,
# 1.72 and 3.57, 0.90 and 0.89, 1.11 and 1.00, 2.06 and 1.64; log_softmax's 0.62, 0.84 and 1.02 of
# 32, 64 and 72). Its vectors of AVX2, which are half as long, begin to win at rows of 8.
MIN_ROW = 3
MIN_VECTOR_ROW = 80
# And scaled: 0.69 and 0.98 of 16, 0.98 and 1.51 of 32, 1.24 and 1.32 of 48 (log_softmax 0.55 and
# 0.88, 0.82 and 1.27, 1.05 and 1.22).
MIN_SCALED_ROW = 48
_ATEN_VECTOR = 64 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 32  # bytes
# Over dim 1: 0.76 and 0.84 of 1600x500x2, 0.92 and 0.96 of 70000x8x3, 1.03 and 0.94 of 100000x4x4
# (log_softmax 0.84 and 0.92, 0.68 and 0.82), 1.08 and 1.12 of 1066x500x3, 1.52 and 1.32 of
# 30000x16x4, 1.93 and 1.47 of 50000x4x8.
MIN_INNER = 3
MIN_BLOCK = 32  # elements of the columns that lie side by side


def unsupported(x, dim, scale, mask, is_causal, sinks, dropout_p):
    if mask is None and sinks is None and not is_causal and dropout_p == 0:
        least = MIN_SCALED if scale != 1 else MIN_PLAIN if dim == -1 else MIN_COLUMNS
        return unsupported_tensor(x) or left_to_aten("softmax", x, dim, scale, least)
    return unsupported_tensor(x)


def left_to_aten(op, x, dim, scale, least):
    """The refusal of calls in which ATen's kernel is all of the work, or almost."""
    if x.numel() < least:
        return (
            f"ATen's {op} is faster below {least} elements without a mask, "
            f"and input has {x.numel()}"
        )
    if dim == -1:
        N, end = x.shape[-1], MIN_SCALED_ROW if scale != 1 else MIN_VECTOR_ROW
        if N < MIN_ROW or _ATEN_VECTOR // x.element_size() <= N < end:
            return f"ATen's {op} is faster in rows of {N} elements without a mask"
    else:
        N, inner = x.shape[-2:]
        if inner < MIN_INNER or N * inner < MIN_BLOCK:
            return f"ATen's {op} is faster over {inner} columns of {N} elements without a mask"
    return None


def forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    return softmax_of(x, dim, scale, mask, is_causal, sinks, dropout_p, seed)


def backward(dy, y, shares, dim, scale, dropout_p, seed):
    return gradients_of(dy, y, dim, scale, shares, dropout_p, seed)
