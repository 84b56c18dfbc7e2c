"""GELU of a linear layer's output with the layer's bias: exact and tanh."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    return x, torch.randn(shape[-1], device=device).to(dtype)


BENCHMARK = Benchmark(
    op="gelu",
    shapes={
        "cpu": [(1024, 1536), (1024, 3072), (4096, 3072)],
        "cuda": [(8192, N) for N in (3072, 16384, 4096, 8192)],
    },
    inputs=inputs,
    eager=lambda x, bias, *, approximate: F.gelu(x + bias, approximate=approximate),
    call=lambda x, bias, *, approximate: ((x,), {"approximate": approximate, "bias": bias}),
    variants=({"approximate": "none"}, {"approximate": "tanh"}),
    bytes_forward=lambda M, N, *, s, approximate: 2 * M * N * s,  # x, y
    bytes_backward=lambda M, N, *, s, approximate: 3 * M * N * s,  # dy, x, dx
)
