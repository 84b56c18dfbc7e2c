"""SwiGLU (Shazeer 2020): y = silu(gate) * up."""

from __future__ import annotations

from torch import Tensor

from slimkernels.dispatch import Op
from slimkernels.ops import _gated


def swiglu(input: Tensor, *, gate: Tensor | None = None, backend: str | None = None) -> Tensor:
    """silu(gate) * up: the inside of the feed-forward layer of Llama and its like.

    input    (..., 2 N), [gate, up] side by side, gate first, as one product with the stacked
             weights of gate_proj and up_proj makes them; or up alone, (..., N), with `gate` given.
             float32, float16, bfloat16 or float64. Views, such as halves that are stored in the
             other order, are read where they lie.
    gate     input's shape, dtype and device, or None. Under autocast another dtype will do: both
             are computed in the wider one, as torch multiplies them
    Returns  (..., N), input's dtype (gate's where that is wider); computed in float32 (float64
             for float64); the backend "torch" rounds the gate's activation, as eager does
    Saves    input and gate
    Errors   ValueError naming the argument whose shape, dtype or device is wrong

    Caution: torch's F.glu has the gate last.
    """
    return _gated.multiply(SWIGLU, _gated.SwiGLU, input, gate, "silu", backend)


def _arguments(input, *, gate=None):
    return _gated.gated_arguments("swiglu", input, gate, "silu")


# Order: triton before cuda until a table of GPU measurements says otherwise.
SWIGLU = Op("swiglu", order=("triton", "cuda", "cpu"), arguments=_arguments)
