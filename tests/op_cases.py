"""What the op tests share: the backends, their devices, and eager or compiled calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimkernels.dispatch import OPS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNEL_BACKENDS = ["triton", "cuda", "cpu"]


def device_of(backend: str) -> torch.device:
    """Where a backend's tests put their tensors."""
    gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def skip_unsupported(op: str, backend: str, *args, **kwargs) -> None:
    """Skip with unsupported()'s own sentence: the test report documents the support matrix."""
    arguments = OPS[op].arguments(*args, **kwargs)
    if reason := OPS[op].unsupported(backend, *arguments):
        pytest.skip(reason)


def maybe_compiled(function: Callable, compiled: bool) -> Callable:
    """`function` itself, or traced whole by torch.compile, which fails on any graph break."""
    if not compiled:
        return function
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_rounding_alone(ours: Tensor, theirs: Tensor, terms: int) -> None:
    """Two evaluations of one formula in one dtype, on inputs of size 1, differ by rounding alone.

    terms  of the longest sum. Each evaluation rounds once a term, and four times beside, by half
           an eps of the largest value; the two of them together by twice as much
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    if theirs.numel() == 0:
        return
    # torch's maximum, which a NaN anywhere is; Python's passes one over.
    size, error = theirs.abs().max().item(), (ours - theirs).abs().max().item()
    assert theirs.isfinite().all()
    allowed = (terms + 4) * torch.finfo(theirs.dtype).eps * max(size, 1.0)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def with_seed(function: Callable) -> Callable:
    """A function whose dropout is the same at every call: draw_seed reads torch's generator."""

    def seeded(*inputs):
        torch.manual_seed(7)
        return function(*inputs)

    return seeded
