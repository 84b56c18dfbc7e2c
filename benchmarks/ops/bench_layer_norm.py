"""LayerNorm at the widths of BERT, and of larger models on a GPU."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device).to(dtype).unbind()
    return x, weight, bias


BENCHMARK = Benchmark(
    op="layer_norm",
    shapes={
        "cpu": [(1024, 384), (1024, 768), (4096, 768), (1024, 1024), (4096, 4096)],
        "cuda": [(8192, N) for N in (768, 4096, 1024, 2048, 8192)],
    },
    inputs=inputs,
    eager=lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
    call=lambda x, weight, bias: ((x, x.shape[-1:], weight, bias), {}),
    bytes_forward=lambda M, N, *, s: 2 * M * N * s,  # x, y
    bytes_backward=lambda M, N, *, s: 3 * M * N * s,  # dy, x, dx
)
