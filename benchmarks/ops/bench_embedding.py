"""Token, position and segment embeddings, LayerNorm and dropout: what BERT begins with."""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark

POSITIONS, SEGMENTS = 512, 2


def inputs(shape, dtype, device):
    M, N, V = shape
    tables = (torch.randn(rows, N, device=device).to(dtype) for rows in (V, POSITIONS, SEGMENTS))
    ids = torch.randint(0, V, (M,), device=device), torch.arange(M, device=device) % 128
    ids = *ids, torch.arange(M, device=device) // 64 % 2
    norm = torch.randn(2, N, device=device).to(dtype).unbind()
    return *(t for pair in zip(ids, tables, strict=True) for t in pair), *norm


def eager(ids, weight, position_ids, position, segment_ids, segment, *norm, dropout_p):
    total = F.embedding(ids, weight) + F.embedding(position_ids, position)
    total = total + F.embedding(segment_ids, segment)
    return F.dropout(F.layer_norm(total, total.shape[-1:], *norm), dropout_p)


def call(ids, weight, position_ids, position, segment_ids, segment, *norm, dropout_p):
    return (ids, weight), {
        **{"position_ids": position_ids, "position_weight": position},
        **{"segment_ids": segment_ids, "segment_weight": segment},
        **{"norm_weight": norm[0], "norm_bias": norm[1], "dropout_p": dropout_p},
    }


BENCHMARK = Benchmark(
    op="embedding",
    shapes={
        "cpu": [(1024, 768, 30522), (4096, 768, 30522)],
        "cuda": [(8192, 768, 30522), (16384, 1024, 50304)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({"dropout_p": 0.0}, {"dropout_p": 0.1}),
    bytes_forward=lambda M, N, V, *, s, dropout_p: 2 * M * N * s,  # rows of weight, y
    # dy, rows of weight, dweight
    bytes_backward=lambda M, N, V, *, s, dropout_p: (2 * M * N + V * N) * s,
)
