"""Attention with a learned bias, one for every sequence, and its gradient."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark
from benchmarks.ops.bench_scaled_dot_product_attention import flops_forward


def inputs(shape, dtype, device):
    _, H, T, _ = shape
    query, key, value = torch.randn(3, *shape, device=device).to(dtype).unbind()
    return query, key, value, torch.randn(1, H, T, T, device=device).to(dtype)


def eager(query, key, value, bias):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def call(query, key, value, bias):
    return (query, key, value, bias), {}


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    shapes={
        "cpu": [(4, 12, 512, 64), (8, 12, 128, 32)],
        "cuda": [(4, 16, 4096, 128), (8, 16, 2048, 64)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    flops_forward=flops_forward,
    # The scores and dP once more, for a gradient that every sequence adds to.
    flops_backward=lambda *shape, **variant: 3.5 * flops_forward(*shape, **variant),
    gate_shape=lambda shape: (2, 2, min(shape[2], 512), shape[3]),
)
