"""residual + dropout(x + bias) in one pass: the end of both halves of a pre-norm block."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    x, residual = torch.randn(2, *shape, device=device).to(dtype).unbind()
    return x, torch.randn(shape[-1], device=device).to(dtype), residual


def eager(x, bias, residual, *, dropout_p):
    return residual + F.dropout(x + bias, dropout_p)


BENCHMARK = Benchmark(
    op="bias_dropout_add",
    shapes={
        "cpu": [(1024, 384), (1024, 768), (4096, 768), (4096, 4096)],
        "cuda": [(8192, N) for N in (768, 4096, 1024, 2048, 8192)],
    },
    inputs=inputs,
    eager=eager,
    variants=({"dropout_p": 0.0}, {"dropout_p": 0.1}),
    bytes_forward=lambda M, N, *, s, dropout_p: 3 * M * N * s,  # x, residual, y
    # dy, and dx, which is dy without dropout
    bytes_backward=lambda M, N, *, s, dropout_p: (2 if dropout_p else 1) * M * N * s,
)
