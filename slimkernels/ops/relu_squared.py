"""Squared ReLU (So et al. 2021, Primer): y = max(z, 0)^2 with z = x + bias."""

from __future__ import annotations

from torch import Tensor

from slimkernels.dispatch import Op
from slimkernels.ops import _activation


def relu_squared(
    input: Tensor, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """max(z, 0)^2 with z = input + bias.

    input    any shape, float32, float16, bfloat16 or float64
    bias     (N,), input's last dimension, in input's dtype or float32: a linear layer's bias
             added here costs no pass over memory of its own
    Returns  input's shape and dtype; computed in float32 (float64 for float64). In float16 it
             overflows from z = 256 on.
    Saves    input and bias
    Errors   ValueError naming the argument whose shape, dtype or device is wrong
    """
    function = _activation.ReLUSquared
    return _activation.activate(RELU_SQUARED, function, input, bias, "relu_squared", backend)


def _arguments(input, *, bias=None):
    return _activation.activation_arguments("relu_squared", input, bias, "relu_squared")


# Order: triton before cuda until a table of GPU measurements says otherwise.
RELU_SQUARED = Op("relu_squared", order=("triton", "cuda", "cpu"), arguments=_arguments)
