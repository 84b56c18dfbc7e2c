"""The matrix products of a BERT block: q, k, v in one, the two of the feed-forward, the head."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    M, N, K = shape
    x = torch.randn(M, K, device=device).to(dtype)
    weight = (torch.randn(N, K, device=device) / K**0.5).to(dtype)
    return x, weight, torch.randn(N, device=device).to(dtype)


BENCHMARK = Benchmark(
    op="linear",
    shapes={
        "cpu": [(1024, 1536, 384), (1024, 3072, 768), (1024, 768, 3072), (154, 30522, 768)],
        "cuda": [(8192, 3072, 768), (8192, 4096, 4096), (8192, 768, 3072), (1232, 30522, 768)],
    },
    inputs=inputs,
    eager=F.linear,
    flops_forward=lambda M, N, K, *, s: 2 * M * N * K,
    flops_backward=lambda M, N, K, *, s: 4 * M * N * K,  # dx and dweight
)
