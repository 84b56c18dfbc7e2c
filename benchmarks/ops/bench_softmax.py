"""Scaled softmax of attention scores: plain, causal, and with a padding mask."""

import torch

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    B, _, _, Tk = shape
    x = torch.randn(shape, device=device).to(dtype)
    lengths = torch.linspace(Tk // 4, Tk, B, device=device).long()
    mask = torch.arange(Tk, device=device) < lengths.view(B, 1, 1, 1)  # (B, 1, 1, Tk)
    return x, mask


def eager(x, mask, *, kind):
    scores = x * 0.125
    if kind == "causal":
        mask = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
    if kind != "plain":
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1)


def call(x, mask, *, kind):
    mask = mask if kind == "padded" else None
    return (x,), {"scale": 0.125, "mask": mask, "is_causal": kind == "causal"}


BENCHMARK = Benchmark(
    op="softmax",
    shapes={
        "cpu": [(8, 12, 128, 128), (4, 12, 512, 512)],
        "cuda": [(8, 12, 512, 512), (4, 16, 2048, 2048), (1, 16, 8192, 8192)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({"kind": "plain"}, {"kind": "padded"}, {"kind": "causal"}),
    # Counted whole, also where half of it is masked: eager reads and writes it all.
    bytes_forward=lambda B, H, Tq, Tk, *, s, kind: 2 * B * H * Tq * Tk * s,  # x, y
    bytes_backward=lambda B, H, Tq, Tk, *, s, kind: 3 * B * H * Tq * Tk * s,  # dy, y, dx
    gate_shape=lambda shape: (shape[0], min(shape[1], 2), *shape[2:]),
)
