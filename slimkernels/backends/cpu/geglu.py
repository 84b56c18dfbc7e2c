"""GEGLU on the CPU."""

from slimkernels.backends.cpu import _gated
from slimkernels.backends.cpu._common import unsupported_size, unsupported_tensor

# Elements of y below which eager's two passes are the faster. Their time over ours, forward and
# backward, float32 and bfloat16, an Intel Xeon with AMX, two busy threads: 0.50 and 0.81 at 64x32,
# 0.83 and 0.76 at 128x256, 1.33 and 1.11 at 256x256, 2.3 and 3.0 at 8192x1536; by tanh, for which
# ATen has no fast bfloat16, 0.55 and 1.23, 1.11 and 1.02, 1.58 and 1.51, 2.6 and 3.4.
MIN_ELEMENTS = 1 << 16


def unsupported(x, gate, curve):
    size = x.numel() // (2 if gate is None else 1)
    return unsupported_tensor(x) or unsupported_size(size, MIN_ELEMENTS)


def forward(x, gate, curve):
    return _gated.forward(x, gate, curve)


def backward(dy, x, gate, curve):
    return _gated.backward(dy, x, gate, curve)
