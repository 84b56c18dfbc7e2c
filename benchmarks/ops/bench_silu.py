"""silu of a linear layer's output with the layer's bias."""

import torch.nn.functional as F

from benchmarks.harness import Benchmark
from benchmarks.ops.bench_gelu import inputs

BENCHMARK = Benchmark(
    op="silu",
    shapes={
        "cpu": [(1024, 1536), (1024, 3072), (4096, 3072)],
        "cuda": [(8192, N) for N in (3072, 16384, 4096, 8192)],
    },
    inputs=inputs,
    eager=lambda x, bias: F.silu(x + bias),
    call=lambda x, bias: ((x,), {"bias": bias}),
    bytes_forward=lambda M, N, *, s: 2 * M * N * s,  # x, y
    bytes_backward=lambda M, N, *, s: 3 * M * N * s,  # dy, x, dx
)
