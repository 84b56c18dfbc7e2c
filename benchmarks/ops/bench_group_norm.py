"""GroupNorm of 32 groups at the sizes of a diffusion model's UNet."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark

GROUPS = 32


def inputs(shape, dtype, device):
    x = torch.randn(shape, device=device).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype).unbind()
    return x, weight, bias


BENCHMARK = Benchmark(
    op="group_norm",
    shapes={
        "cpu": [(2, 320, 32, 32), (2, 640, 16, 16), (2, 1280, 8, 8), (8, 320, 64, 64)],
        "cuda": [(8, 320, 64, 64), (8, 1280, 8, 8), (8, 640, 32, 32), (8, 128, 256, 256)],
    },
    inputs=inputs,
    eager=lambda x, weight, bias: F.group_norm(x, GROUPS, weight, bias),
    call=lambda x, weight, bias: ((x, GROUPS, weight, bias), {}),
    bytes_forward=lambda N, C, H, W, *, s: 2 * N * C * H * W * s,  # x, y
    bytes_backward=lambda N, C, H, W, *, s: 3 * N * C * H * W * s,  # dy, x, dx
)
