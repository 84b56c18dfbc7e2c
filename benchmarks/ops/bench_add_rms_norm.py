"""residual + x, then RMSNorm, in one pass: the end of both halves of a decoder's block."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    x, residual = torch.randn(2, *shape, device=device).to(dtype).unbind()
    return x, residual, torch.randn(shape[-1], device=device).to(dtype)


def eager(x, residual, weight, *, dropout_p):
    total = residual + F.dropout(x, dropout_p)
    return F.rms_norm(total, x.shape[-1:], weight, 1e-6), total


def call(x, residual, weight, *, dropout_p):
    return (x, residual, x.shape[-1:], weight, 1e-6), {"dropout_p": dropout_p}


BENCHMARK = Benchmark(
    op="add_rms_norm",
    shapes={
        "cpu": [(4096, 768), (1024, 384), (64, 64), (4096, 4096)],
        "cuda": [(8192, N) for N in (4096, 2048, 768, 8192)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({"dropout_p": 0.0}, {"dropout_p": 0.1}),
    bytes_forward=lambda M, N, *, s, dropout_p: 4 * M * N * s,  # x, residual, y, sum
    # dy, dsum, sum, dresidual, and dx, which is dresidual without dropout
    bytes_backward=lambda M, N, *, s, dropout_p: (5 if dropout_p else 4) * M * N * s,
)
