"""Attention of one query a sequence on a cache of keys, a batch of unlike lengths: decoding.

Eager is given the cache's lengths as a mask. What backward would take is measured, too, though a
program that decodes has none.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    B, H, Hkv, T, D = shape
    query = torch.randn(B, H, 1, D, device=device).to(dtype)
    key, value = torch.randn(2, B, Hkv, T, D, device=device).to(dtype).unbind()
    lengths = torch.linspace(max(T // 2, 1), T, B, device=device).to(torch.int32)
    mask = torch.arange(T, device=device) < lengths.view(B, 1, 1, 1)
    return query, key, value, lengths, mask


def eager(query, key, value, lengths, mask):
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=is_grouped)


def call(query, key, value, lengths, mask):
    is_grouped = query.shape[1] != key.shape[1]
    return (query, key, value), {"key_lengths": lengths, "enable_gqa": is_grouped}


def bytes_forward(B, H, Hkv, T, D, *, s):
    """The keys and values that are there, read once."""
    return 2 * B * Hkv * 0.75 * T * D * s


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    shapes={
        "cpu": [(1, 12, 12, 4096, 64), (8, 12, 12, 1024, 64), (8, 12, 2, 4096, 64)],
        "cuda": [(1, 32, 8, 16384, 128), (16, 32, 8, 4096, 128), (64, 32, 32, 2048, 128)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    bytes_forward=bytes_forward,
    # The same again, and the gradients of keys and values written.
    bytes_backward=lambda *shape, s: 2 * bytes_forward(*shape, s=s),
    gate_shape=lambda shape: (min(shape[0], 2), 2, 1, min(shape[3], 1024), shape[4]),
)
