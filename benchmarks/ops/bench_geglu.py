"""gelu(gate) * up of one packed tensor: exact and tanh."""

import torch.nn.functional as F

from benchmarks.harness import Benchmark
from benchmarks.ops.bench_swiglu import SHAPES, inputs


def eager(x, *, approximate):
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate=approximate) * up


BENCHMARK = Benchmark(
    op="geglu",
    shapes=SHAPES,
    inputs=inputs,
    eager=eager,
    variants=({"approximate": "none"}, {"approximate": "tanh"}),
    bytes_forward=lambda M, N, *, s, approximate: M * (N + N // 2) * s,  # x, y
    bytes_backward=lambda M, N, *, s, approximate: M * (2 * N + N // 2) * s,  # dy, x, dx
)
