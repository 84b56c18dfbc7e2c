"""SiLU, or swish (Elfwing, Uchibe, Doya 2017): y = z * sigmoid(z) with z = x + bias."""

from __future__ import annotations

from torch import Tensor

from slimkernels.dispatch import Op
from slimkernels.ops import _activation


def silu(input: Tensor, *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """z * sigmoid(z) with z = input + bias.

    input    any shape, float32, float16, bfloat16 or float64
    bias     (N,), input's last dimension, in input's dtype or float32: a linear layer's bias
             added here costs no pass over memory of its own
    Returns  input's shape and dtype; computed in float32 (float64 for float64)
    Saves    input and bias
    Errors   ValueError naming the argument whose shape, dtype or device is wrong
    """
    return _activation.activate(SILU, _activation.SiLU, input, bias, "silu", backend)


def _arguments(input, *, bias=None):
    return _activation.activation_arguments("silu", input, bias, "silu")


# Order: triton before cuda until a table of GPU measurements says otherwise.
SILU = Op("silu", order=("triton", "cuda", "cpu"), arguments=_arguments)
