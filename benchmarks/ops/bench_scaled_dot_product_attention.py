"""Attention: plain, causal, with dropout, and over keys of different lengths.

What else a call may ask for is in bench_attention_features.py, ragged batches against padded ones
in bench_attention_ragged.py, and few queries on a long cache in bench_attention_decoding.py.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    B, _, T, _ = shape
    query, key, value = torch.randn(3, *shape, device=device).to(dtype).unbind()
    key_lengths = torch.linspace(max(T // 4, 1), T, B, device=device).to(torch.int32)
    mask = torch.arange(T, device=device) < key_lengths.view(B, 1, 1, 1)  # (B, 1, 1, Tk)
    return query, key, value, key_lengths, mask


def eager(query, key, value, key_lengths, mask, *, padded=False, **variant):
    mask = mask if padded else None
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **variant)


def forced(backend):
    """eager by one of torch's own backends, which raises where that cannot run."""

    def rival(*inputs, **variant):
        with sdpa_kernel(backend):
            return eager(*inputs, **variant)

    return rival


# On a CPU torch has one kernel, which eager takes by itself.
RIVALS = {
    "sdpa_flash": forced(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": forced(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": forced(SDPBackend.EFFICIENT_ATTENTION),
}


def call(query, key, value, key_lengths, mask, *, padded=False, **variant):
    lengths = {"key_lengths": key_lengths} if padded else {}
    return (query, key, value), {**variant, **lengths}


def flops_forward(B, H, T, D, *, s, is_causal=False, padded=False, dropout_p=0.0):
    """Two products of 2 * T * T * D; the causal half, or the keys that are there."""
    share = 0.5 if is_causal else 0.625 if padded else 1.0
    return 4 * B * H * T * T * D * share


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    shapes={
        "cpu": [(8, 12, 128, 32), (4, 12, 512, 32), (8, 12, 128, 64), (4, 12, 512, 64)],
        "cuda": [
            (16, 12, 512, 64),
            (4, 16, 4096, 128),
            (16, 16, 1024, 64),
            (8, 16, 2048, 64),
            (8, 16, 2048, 128),
            (4, 16, 4096, 64),
            (1, 16, 16384, 64),
            (1, 16, 16384, 128),
        ],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({}, {"is_causal": True}, {"padded": True}, {"dropout_p": 0.1}),
    flops_forward=flops_forward,
    # Five products against forward's two: the scores again, dP, dV, dQ, dK.
    flops_backward=lambda *shape, **variant: 2.5 * flops_forward(*shape, **variant),
    rivals=RIVALS if torch.cuda.is_available() else {},
    # float64 scores of one head of 16384 tokens take 2 GB, and backward holds several.
    gate_shape=lambda shape: shape if shape[2] <= 512 else (min(shape[0], 2), 1, *shape[2:]),
)
