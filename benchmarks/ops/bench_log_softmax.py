"""log_softmax of logits, over rows of a vocabulary and over the channels of images."""

import torch

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    return (torch.randn(shape, device=device).to(dtype),)


def call(x):
    return (x, 1), {}


BENCHMARK = Benchmark(
    op="log_softmax",
    shapes={
        "cpu": [(4096, 1000), (8, 32, 64, 64), (512, 30522)],
        "cuda": [(8192, 1000), (32, 64, 128, 128), (8192, 50304)],
    },
    inputs=inputs,
    eager=lambda x: torch.log_softmax(x, 1),
    call=call,
    bytes_forward=lambda *shape, s: 2 * torch.Size(shape).numel() * s,  # x, y
    bytes_backward=lambda *shape, s: 3 * torch.Size(shape).numel() * s,  # dy, y, dx
    # Few rows, but 2^20 elements or more, which no kernel refuses.
    gate_shape=lambda shape: (min(shape[0], max(64, 2**21 // shape[1])), *shape[1:]),
)
