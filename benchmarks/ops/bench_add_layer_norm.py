"""residual + dropout(x), then LayerNorm, in one pass: the end of both halves of a block."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    x, residual = torch.randn(2, *shape, device=device).to(dtype).unbind()
    weight, bias = torch.randn(2, shape[-1], device=device).to(dtype).unbind()
    return x, residual, weight, bias


def eager(x, residual, weight, bias, *, dropout_p):
    total = residual + F.dropout(x, dropout_p)
    return F.layer_norm(total, x.shape[-1:], weight, bias), total


def call(x, residual, weight, bias, *, dropout_p):
    return (x, residual, x.shape[-1:], weight, bias), {"dropout_p": dropout_p}


BENCHMARK = Benchmark(
    op="add_layer_norm",
    shapes={
        "cpu": [(1024, 384), (1024, 768), (4096, 768), (4096, 4096)],
        "cuda": [(8192, N) for N in (768, 4096, 1024, 2048, 8192)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({"dropout_p": 0.0}, {"dropout_p": 0.1}),
    bytes_forward=lambda M, N, *, s, dropout_p: 4 * M * N * s,  # x, residual, y, sum
    # dy, dsum, sum, dresidual, and dx, which is dresidual without dropout
    bytes_backward=lambda M, N, *, s, dropout_p: (5 if dropout_p else 4) * M * N * s,
)
