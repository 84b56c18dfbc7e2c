"""What the optimizers' tests share: parameters, gradients and a training run without a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimkernels import optim
from slimkernels.optim import AdamW, Muon

# Odd sizes, a scalar, nothing at all, more than one chunk of every backend.
SHAPES = [(64,), (7, 33), (1030,), (), (0,), (5, 7, 3), (16384 + 9,)]
SMALL = [(64,), (7, 33), (1030,), (), (0,)]
MATRICES = [(4, 6), (6, 4), (3, 3)]  # what every optimizer takes
BACKENDS = ["torch", "cpu", "triton"]
OURS = [getattr(optim, name) for name in optim.__all__]

every_optimizer = pytest.mark.parametrize("make", OURS)
# Of a class and torch's own.
PAIRS = {AdamW: torch.optim.AdamW, Muon: torch.optim.Muon}
every_pair = pytest.mark.parametrize("make, torchs", PAIRS.items())
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def drawn(shapes: list[tuple], seed: int, scale: float = 1.0) -> list[Tensor]:
    """float32 numbers that bfloat16 holds, so that every dtype sees the same."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).mul(scale).bfloat16().float() for s in shapes]


def parameters(shapes: list[tuple], dtype: torch.dtype, device="cpu") -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.to(device, dtype)) for p in drawn(shapes, 0)]


def gradients(shapes: list[tuple], steps: int, scale: float = 1.0) -> list[list[Tensor]]:
    return [drawn(shapes, 1 + step % 16, scale * (0.1 + step % 3)) for step in range(steps)]


def run(
    make: Callable,
    shapes: list[tuple],
    steps: int,
    dtype: torch.dtype = torch.float32,
    device="cpu",
    before_step: Callable = lambda params, optimizer: None,
):
    """(parameters, optimizer) after `steps` steps of make(parameters) on the same gradients."""
    params = parameters(shapes, dtype, device)
    optimizer = make(params)
    for grads in gradients(shapes, steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(device, dtype)
        before_step(params, optimizer)
        optimizer.step()
    return params, optimizer


def states(optimizer, key: str) -> list[Tensor]:
    """A key's state of every parameter."""
    return [optimizer.state[p][key] for g in optimizer.param_groups for p in g["params"]]


def snapshot(optimizer) -> list[Tensor]:
    """Copies of all parameters and states, in an order of their own."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    kept = [state for param in params for _, state in sorted(optimizer.state[param].items())]
    return [tensor.detach().clone() for tensor in (*params, *kept)]


def assert_same_bits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), i


def feed(params, seed=0):
    for param, grad in zip(params, drawn([p.shape for p in params], seed), strict=True):
        param.grad = grad.to(param)


def train(params, optimizer, steps=3, first_seed=0):
    for seed in range(first_seed, first_seed + steps):
        feed(params, seed)
        optimizer.step()


def close(ours, theirs, make=AdamW):
    """Of runs of up to six steps of 0.05 or less.

    A step rounds a parameter ten times or so. Muon's products are bfloat16, whose rounding, 2^-8,
    its polynomial magnifies.
    """
    rounding = 6 * 10 * torch.finfo(torch.float32).eps
    tolerance = {"rtol": rounding, "atol": 6 * 0.05 * 2**-6 if make is Muon else 0.2 * rounding}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
