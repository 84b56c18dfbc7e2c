"""The loss of a language model's head: BERT's masked positions, all of a small model's tokens, and
masked positions found in all tokens.
"""

import functools

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    rows, width, vocabulary = shape
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), device=device)
    return x, weight, target, torch.randn(vocabulary, device=device).to(dtype)


def eager(x, weight, target, bias, *, kept):
    return F.cross_entropy(F.linear(x, weight, bias), masked(target, kept))


def call(x, weight, target, bias, *, kept):
    return (x, weight, masked(target, kept), bias), {}


@functools.lru_cache(maxsize=4)  # before the clock starts, for all providers
def masked(target, kept):
    """Labels at `kept` per cent of the rows."""
    rows = torch.arange(len(target), device=target.device)
    return torch.where(rows * 61 % 100 < kept, target, -100)


BENCHMARK = Benchmark(
    op="linear_cross_entropy",
    shapes={
        "cpu": [(154, 768, 30522), (1024, 384, 30522)],
        "cuda": [(1232, 768, 30522), (8192, 768, 30522), (8192, 2048, 50304), (8192, 2048, 128256)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({"kept": 100}, {"kept": 15}),
    flops_forward=lambda N, C, V, *, s, kept: 2 * N * C * V * kept / 100,
    flops_backward=lambda N, C, V, *, s, kept: 4 * N * C * V * kept / 100,
    gate_shape=lambda shape: (min(shape[0], 512), shape[1], shape[2]),
)
