"""silu(gate) * up of one packed tensor, as the stacked gate and up projections make it."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark

# Of a packed tensor: twice the width of a feed-forward layer.
SHAPES = {
    "cpu": [(1024, 3072), (1024, 6144), (4096, 6144)],
    "cuda": [(8192, N) for N in (6144, 28672, 11008, 22016)],
}


def inputs(shape, dtype, device):
    return (torch.randn(shape, device=device).to(dtype),)


def eager(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


BENCHMARK = Benchmark(
    op="swiglu",
    shapes=SHAPES,
    inputs=inputs,
    eager=eager,
    bytes_forward=lambda M, N, *, s: M * (N + N // 2) * s,  # x, y
    bytes_backward=lambda M, N, *, s: M * (2 * N + N // 2) * s,  # dy, x, dx
)
