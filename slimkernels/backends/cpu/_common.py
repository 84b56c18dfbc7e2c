"""What every CPU backend module needs: the extension, dtype numbers, pointers, common refusals."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from slimkernels.backends._tensors import pointer, pointers

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


def unsupported_tensor(x: Tensor, name: str = "input") -> str | None:
    """The refusals that do not depend on the op: device, dtype, instruction set."""
    if not x.is_cpu:
        return f"it needs CPU tensors and {name} is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it is written for float32 and bfloat16 and {name} is {x.dtype}"
    if not _RUNS_HERE:
        return f"this machine has none of the instruction sets {_ISAS_BUILT}"
    return None


def unsupported_size(elements: int, least: int) -> str | None:
    """The refusal of an elementwise op that eager PyTorch's own few passes are faster than."""
    if elements < least:
        return f"eager PyTorch is faster below {least} elements, and the output has {elements}"
    return None


def run(kernel: Callable[..., None], *arguments: int | float) -> None:
    """Call a kernel on as many threads as torch would use in the calling thread."""
    kernel(torch.get_num_threads(), *arguments)


def address(numbers: array | None) -> int:
    """Where a struct of 64-bit integers lies, which its array must outlive; 0 stands for None."""
    return 0 if numbers is None else numbers.buffer_info()[0]


def empty_gradient(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Room for the gradient of a parameter; an empty tensor for one that was not given."""
    return x.new_empty(0) if parameter is None else torch.empty_like(parameter)


def norm_parameters(
    weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """weight and bias without gaps, and their dtype's number; of two dtypes both become float32."""
    dtypes = {p.dtype for p in (weight, bias) if p is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    weight, bias = (None if p is None else as_dtype(p, dtype).contiguous() for p in (weight, bias))
    return weight, bias, DTYPES[dtype]


def as_wanted(
    gradients: tuple[Tensor, Tensor], parameters: tuple[Tensor | None, Tensor | None]
) -> Iterator[Tensor]:
    """The gradients of what norm_parameters made, in the dtypes that came."""
    for gradient, parameter in zip(gradients, parameters, strict=True):
        yield gradient if parameter is None else as_dtype(gradient, parameter.dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Tensor.to takes microseconds to find that it has nothing to do.
    return x if x.dtype == dtype else x.to(dtype)


__all__ = [
    "DTYPES",
    "_cpu",
    "address",
    "as_dtype",
    "as_wanted",
    "empty_gradient",
    "norm_parameters",
    "pointer",
    "pointers",
    "run",
    "unsupported_size",
    "unsupported_tensor",
]
