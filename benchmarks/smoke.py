"""Every op once, small, forward and backward, and every optimizer's step, on each backend.

This is what a memory checker is run on:

compute-sanitizer python -m benchmarks.smoke --device cuda
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

import slimkernels
from benchmarks.harness import NATIVE
from slimkernels.dispatch import OPS
from slimkernels.ops._update import UPDATES
from slimkernels.testing import sample_inputs


def main(argv: list[str] | None = None) -> int:
    """0 when every kernel that accepts its sample ran; what a kernel raises is not caught."""
    parser = argparse.ArgumentParser("python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    ran = 0
    for name, sample in sorted(sample_inputs.items()):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            args, kwargs = sample(device, dtype)
            for backend in (b for b in OPS[name].order if b in NATIVE[device.type]):
                reason = OPS[name].unsupported(backend, *OPS[name].arguments(*args, **kwargs))
                if reason is None:
                    run_once(name, args, kwargs, backend)
                    ran += 1
                print(f"{name} {backend} {dtype}: {reason or 'ran'}", flush=True)
    for name in slimkernels.optim.__all__:
        for dtype in (torch.float32, torch.bfloat16):
            for backend in (b for b in UPDATES[name.lower()].order if b in NATIVE[device.type]):
                module = UPDATES[name.lower()].modules[backend]
                reason = module if isinstance(module, str) else None
                if reason is None:
                    step_once(getattr(slimkernels.optim, name), device, dtype, backend)
                    ran += 1
                print(f"{name} {backend} {dtype}: {reason or 'ran'}", flush=True)
    print(f"{ran} kernels ran")
    return 0 if ran else 1


def run_once(name: str, args: tuple, kwargs: dict, backend: str) -> None:
    """Forward and backward of one call, waiting for the device at the end."""
    leaves = [t.detach().requires_grad_() if _is_floating(t) else t for t in args]
    outputs = getattr(slimkernels, name)(*leaves, **kwargs, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in leaves if _is_floating(t)]
    torch.autograd.grad(outputs, wanted, [torch.randn_like(y) for y in outputs])
    if outputs[0].device.type == "cuda":
        torch.cuda.synchronize()


def step_once(make, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    """One step of an optimizer over matrices of odd sizes, waiting for the device at the end."""
    shapes = ((33, 65), (70, 3), (1, 1), (0, 4))
    params = [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    make(params, max_grad_norm=1.0, skip_nonfinite=True, backend=backend).step()
    if device.type == "cuda":
        torch.cuda.synchronize()


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


if __name__ == "__main__":
    sys.exit(main())
