"""GELU (Hendrycks, Gimpel 2016): y = z * Phi(z) with z = x + bias, exact or by tanh."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import Op, may_skip_dispatcher, needs_gradient
from slimkernels.ops import _activation
from slimkernels.ops._known_calls import chosen_before
from slimkernels.ops.linear import linear


def gelu(
    input: Tensor,
    *,
    approximate: str = "none",
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """z * Phi(z) with z = input + bias, Phi being the normal distribution function.

    input        any shape, float32, float16, bfloat16 or float64
    approximate  "none" for Phi itself; "tanh" for (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2
    bias         (N,), input's last dimension, in input's dtype or float32: a linear layer's bias
                 added here costs no pass over memory of its own
    Returns      input's shape and dtype; computed in float32 (float64 for float64). The kernels
                 keep their relative accuracy for negative z, where torch's 1 + erf loses it.
    Saves        input and bias
    Errors       ValueError naming the argument whose value, shape, dtype or device is wrong
    """
    curve = _activation.gelu_curve("gelu", approximate)
    return _activation.activate(GELU, _activation.GELU, input, bias, curve, backend)


def gelu_of_product(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x @ weight^T + bias), the inside of a feed-forward layer.

    The bias is added in gelu's pass, and on the CPU, where no gradient wants it, the product, which
    nobody else has, is overwritten.
    """
    curve = _activation.gelu_curve("gelu", approximate)
    product = linear(x, weight)
    is_known = chosen_before(((product, bias), ("gelu", curve, None))) == "cpu"
    is_ours = is_known and may_skip_dispatcher((product, bias)) and not _is_watched()
    if is_ours and not needs_gradient(product, bias):
        return GELU.modules["cpu"].forward_in_place(product, bias, curve)
    return gelu(product, approximate=approximate, bias=bias)


def _is_watched() -> bool:
    """Whether a mode sees what functions of torch return, and may keep it."""
    return torch._C._len_torch_function_stack() > 0


def _arguments(input, *, approximate="none", bias=None):
    curve = _activation.gelu_curve("gelu", approximate)
    return _activation.activation_arguments("gelu", input, bias, curve)


# Order: triton before cuda until a table of GPU measurements says otherwise.
GELU = Op("gelu", order=("triton", "cuda", "cpu"), arguments=_arguments)
