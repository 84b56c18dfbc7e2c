"""GEGLU (Shazeer 2020): y = gelu(gate) * up."""

from __future__ import annotations

from torch import Tensor

from slimkernels.dispatch import Op
from slimkernels.ops import _gated
from slimkernels.ops._activation import gelu_curve


def geglu(
    input: Tensor,
    *,
    gate: Tensor | None = None,
    approximate: str = "none",
    backend: str | None = None,
) -> Tensor:
    """gelu(gate) * up: the inside of the feed-forward layer of Gemma, T5 1.1 and ModernBERT.

    input        (..., 2 N), [gate, up] side by side, gate first; or up alone, (..., N), with
                 `gate` given. float32, float16, bfloat16 or float64. Views, such as halves that
                 are stored in the other order, are read where they lie.
    gate         input's shape, dtype and device, or None; under autocast as in swiglu
    approximate  "none" or "tanh", as in gelu; Gemma and T5 1.1 take "tanh"
    Returns      (..., N), input's dtype (gate's where that is wider); computed in float32
                 (float64 for float64); the backend "torch" rounds the gate's activation, as
                 eager does
    Saves        input and gate
    Errors       ValueError naming the argument whose value, shape, dtype or device is wrong

    Caution: torch's F.glu has the gate last, and so has GEGLU in diffusers.
    """
    curve = gelu_curve("geglu", approximate)
    return _gated.multiply(GEGLU, _gated.GEGLU, input, gate, curve, backend)


def _arguments(input, *, gate=None, approximate="none"):
    curve = gelu_curve("geglu", approximate)
    return _gated.gated_arguments("geglu", input, gate, curve)


# Order: triton before cuda until a table of GPU measurements says otherwise.
GEGLU = Op("geglu", order=("triton", "cuda", "cpu"), arguments=_arguments)
