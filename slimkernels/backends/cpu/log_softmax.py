"""The logarithm of softmax on the CPU: csrc/cpu/softmax.cpp and softmax_columns.cpp."""

from slimkernels.backends.cpu._common import unsupported_tensor
from slimkernels.backends.cpu._softmax import gradients_of, softmax_of
from slimkernels.backends.cpu.softmax import MIN_SCALED, left_to_aten

# As softmax's, measured as they were, on a busy machine: 0.71 and 0.59 at 512x128, 0.88 and 0.82 at
# 2048x128, 1.01 and 0.93 at 4096x128, 1.11 and 1.00 at 512x1000 (in bfloat16 0.80 and 0.73, 0.97
# and 0.95, 1.00 and 1.03, 1.32 and 1.21).
MIN_PLAIN = 1 << 19
# Over another dimension: 0.74 and 0.72 over dim 1 of 8x32x1024, 0.91 and 0.94 of 8x32x4096, 1.06
# and 1.33 of 4x1000x256 (0.88 and 0.90, 1.20 and 1.10, 1.25 and 1.42).
MIN_COLUMNS = 1 << 20
# ATen stays ahead in columns of few elements, in one dtype or the other, however many there are:
# 0.70 and 0.77 over dim 1 of 8x100x4096, 0.95 and 1.00 of 32x32x4096, 1.02 and 2.10 of 64x32x4096
# (in bfloat16 0.92 and 0.86, 0.96 and 1.05, 0.84 and 0.85); 1.07 and 1.45 of 8x1000x256
# (1.14 and 1.37).
MIN_HEIGHT = 256


def unsupported(x, dim, scale, mask, is_causal):
    if mask is None and not is_causal:
        least = MIN_SCALED if scale != 1 else MIN_PLAIN if dim == -1 else MIN_COLUMNS
        reason = unsupported_tensor(x) or left_to_aten("log_softmax", x, dim, scale, least)
        if reason is None and dim != -1 and x.shape[-2] < MIN_HEIGHT:
            return f"ATen's log_softmax is faster over columns of {x.shape[-2]} elements"
        return reason
    return unsupported_tensor(x)


def forward(x, dim, scale, mask, is_causal):
    return softmax_of(x, dim, scale, mask, is_causal, log=True)[0]


def backward(dy, y, dim, scale, hides):
    return gradients_of(dy, y, dim, scale, log=True, hides=hides)[0]
