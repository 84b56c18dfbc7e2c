"""RMSNorm at the widths of BERT, and of larger models on a GPU."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    return x, torch.randn(shape[-1], device=device).to(dtype)


BENCHMARK = Benchmark(
    op="rms_norm",
    shapes={
        "cpu": [(4096, 768), (1024, 384), (64, 64), (4096, 4096), (8, 262144)],
        "cuda": [(8192, N) for N in (4096, 2048, 768, 8192)] + [(8, 262144)],
    },
    inputs=inputs,
    eager=lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6),
    call=lambda x, weight: ((x, x.shape[-1:], weight, 1e-6), {}),
    bytes_forward=lambda M, N, *, s: 2 * M * N * s,  # x, y
    bytes_backward=lambda M, N, *, s: 3 * M * N * s,  # dy, x, dx
)
