"""What every CUDA backend module needs: the extension, dtype numbers, common refusals."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from slimkernels.backends._tensors import address, pointers

try:
    from slimkernels import _cuda
except ImportError as error:
    raise ImportError(
        "slimkernels was built without CUDA; reinstall with nvcc on the PATH, or run "
        "python setup.py build_ext --inplace"
    ) from error

# Mirrors enum Dtype in csrc/cuda/ops.h.
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MAX_ROW = 1 << 30


def _architecture(name: str) -> tuple[int, int, bool, bool]:
    """Major and minor; whether it is for this very device ("a"); whether newer ones compile it."""
    major, minor, suffix, ptx = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name).groups()
    return int(major), int(minor), suffix == "a", ptx is not None


# What setup.py compiled for.
ARCHITECTURES = tuple(_architecture(name) for name in _cuda.architectures.split())


def unsupported_tensor(x: Tensor) -> str | None:
    """The refusals that do not depend on the op: device, dtype and compute capability."""
    if x.device.type != "cuda":
        return f"it needs CUDA tensors and input is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32 and input is {x.dtype}"
    major, minor = capability(x)
    if not has_code_for(major, minor):
        return f"it was built for {_cuda.architectures} and {x.device} has {major}.{minor}"
    return None


def has_code_for(major: int, minor: int) -> bool:
    """Whether the extension has machine code for such a device, or PTX that its driver compiles."""
    for built_major, built_minor, is_exact, is_ptx in ARCHITECTURES:
        built, device = (built_major, built_minor), (major, minor)
        if built == device or (is_ptx and not is_exact and built <= device):
            return True
        if built_major == major and built_minor <= minor and not is_exact:
            return True
    return False


def unsupported_row(x: Tensor) -> str | None:
    """The refusal of rows whose columns the kernels cannot count: in 32 bits, past a row's end."""
    if x.shape[-1] > MAX_ROW:
        return f"a row must have at most {MAX_ROW} elements and has {x.shape[-1]}"
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
    "ARCHITECTURES",
    "DTYPES",
    "_cuda",
    "address",
    "capability",
    "dense",
    "dtype_number",
    "has_code_for",
    "launch_place",
    "pointers",
    "unsupported_row",
    "unsupported_tensor",
]
