"""Cross-entropy over BERT's vocabulary: 15 % of 1024 tokens are 154 rows."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    rows, vocabulary = shape
    logits = torch.randn(shape, device=device).to(dtype)
    target = torch.randint(0, vocabulary, (rows,), device=device)
    target[:: max(rows // 8, 1)] = -100
    return logits, target


def eager(logits, target, *, label_smoothing):
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


BENCHMARK = Benchmark(
    op="cross_entropy",
    shapes={
        "cpu": [(154, 30522), (1024, 30522)],
        "cuda": [(1232, 30522), (8192, 30522), (8192, 50304), (8192, 128256)],
    },
    inputs=inputs,
    eager=eager,
    variants=({"label_smoothing": 0.0}, {"label_smoothing": 0.1}),
    bytes_forward=lambda M, N, *, s, label_smoothing: M * N * s,  # logits
    bytes_backward=lambda M, N, *, s, label_smoothing: 2 * M * N * s,  # logits, dlogits
    gate_shape=lambda shape: (min(shape[0], 1024), shape[1]),
)
