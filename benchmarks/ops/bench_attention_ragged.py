"""Attention over a batch of unlike lengths: ragged, against torch over the same batch padded.

Eager is given the padded batch's mask and where its tokens go; the copies that pad query, key and
value and unpad the output are in its time, as they are in a model that keeps its tokens unpadded.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def lengths_of(B, T):
    """From T / 4 to T: 37.5 % of the padded batch is padding."""
    return torch.linspace(max(T // 4, 1), T, B).to(torch.int32)


def inputs(shape, dtype, device):
    B, H, T, D = shape
    lengths = lengths_of(B, T).to(device)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    tokens = int(cu_seqlens[-1])
    query, key, value = torch.randn(3, tokens, H, D, device=device).to(dtype).unbind()
    mask = torch.arange(T, device=device) < lengths[:, None]  # (B, T)
    return query, key, value, cu_seqlens, mask, mask.flatten().nonzero()[:, 0]


def eager(query, key, value, cu_seqlens, mask, places, **variant):
    padded = []
    for x in (query, key, value):
        batch = x.new_zeros(mask.numel(), *x.shape[1:]).index_copy(0, places, x)
        padded.append(batch.unflatten(0, mask.shape).transpose(1, 2))  # (B, H, T, D)
    if not variant:
        variant = {"attn_mask": mask[:, None, None, :]}  # with causality a token sees no padding
    y = F.scaled_dot_product_attention(*padded, **variant)
    return y.transpose(1, 2).flatten(0, 1).index_select(0, places)


def call(query, key, value, cu_seqlens, mask, places, **variant):
    return (query, key, value), {"cu_seqlens": cu_seqlens, **variant}


def flops_forward(B, H, T, D, *, s, is_causal=False):
    pairs = sum(int(n) ** 2 for n in lengths_of(B, T))
    return 4 * H * D * pairs * (0.5 if is_causal else 1.0)


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    shapes={
        "cpu": [(8, 12, 128, 32), (8, 12, 256, 64), (4, 12, 512, 64)],
        "cuda": [(16, 12, 512, 64), (8, 16, 2048, 128)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({}, {"is_causal": True}),
    flops_forward=flops_forward,
    flops_backward=lambda *shape, **variant: 2.5 * flops_forward(*shape, **variant),
    gate_shape=lambda shape: (shape[0], 2, min(shape[2], 512), shape[3]),
)
