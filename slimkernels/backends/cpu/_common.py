"""What every CPU backend module needs: the extension, dtype numbers, pointers, common refusals."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from slimkernels import _cpu
except ImportError as error:
    raise ImportError(
        "the C++ extension is not built; reinstall with a C++ compiler on the PATH, or run "
        "python setup.py build_ext --inplace"
    ) from error

# Mirrors enum Dtype in csrc/ops.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

# Asked once: torch.compile traces unsupported() and cannot trace a call into the extension.
_RUNS_HERE = bool(_cpu.isas_available())
_ISAS_BUILT = ", ".join(_cpu.isas_built())


def unsupported_tensor(x: Tensor) -> str | None:
    """The refusals that do not depend on the op: device, dtype, instruction set."""
    if x.device.type != "cpu":
        return f"it needs CPU tensors and input is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it is written for float32 and bfloat16 and input is {x.dtype}"
    if not _RUNS_HERE:
        return f"this machine has none of the instruction sets {_ISAS_BUILT}"
    return None


def pointer(x: Tensor | None) -> int:
    """The address of x's first element; 0 stands for an optional tensor that was not given."""
    return 0 if x is None else x.data_ptr()


def empty_gradient(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Room for the gradient of a parameter; an empty tensor for one that was not given."""
    return x.new_empty(0) if parameter is None else torch.empty_like(parameter)


__all__ = ["DTYPES", "_cpu", "empty_gradient", "pointer", "unsupported_tensor"]
