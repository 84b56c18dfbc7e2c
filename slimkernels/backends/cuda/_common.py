"""What every CUDA backend module needs: the extension, dtype numbers, common refusals."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.backends._tensors import pointers

try:
    from slimkernels import _cuda
except ImportError as error:
    raise ImportError(
        "slimkernels was built without CUDA; reinstall with nvcc on the PATH, or run "
        "python setup.py build_ext --inplace"
    ) from error

# Mirrors enum Dtype in csrc/cuda/ops.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unsupported_tensor(x: Tensor) -> str | None:
    """The refusals that do not depend on the op: device and dtype."""
    if x.device.type != "cuda":
        return f"it needs CUDA tensors and input is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32 and input is {x.dtype}"
    return None


def launch_place(x: Tensor) -> tuple[int, int]:
    """Where a kernel goes: x's device, and torch's current stream there."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of x's device: (9, 0) of Hopper."""
    properties = torch.cuda.get_device_properties(x.device)
    return properties.major, properties.minor


def dense(x: Tensor | None) -> Tensor | None:
    """An optional tensor without gaps."""
    return None if x is None else x.contiguous()


def dtype_number(x: Tensor | None) -> int:
    """The number of an optional tensor's dtype; any, if there is none."""
    return 0 if x is None else DTYPES[x.dtype]


__all__ = [
    "DTYPES",
    "_cuda",
    "capability",
    "dense",
    "dtype_number",
    "launch_place",
    "pointers",
    "unsupported_tensor",
]
