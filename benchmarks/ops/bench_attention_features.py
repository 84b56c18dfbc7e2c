"""Attention with what a call may ask for beside causality, against the same in plain torch.

torch says a window and ALiBi by a mask, made once and outside of the timed call, and cannot cap the
scores: there eager stores them.
"""

import functools

import torch
import torch.nn.functional as F

import slimkernels as sk
from benchmarks.harness import Benchmark

WINDOW, SOFTCAP = 64, 20.0


def inputs(shape, dtype, device):
    return torch.randn(3, *shape, device=device).to(dtype).unbind()


def slopes_of(H, device):
    return 2.0 ** (-8.0 * torch.arange(1, H + 1, device=device) / H)


@functools.lru_cache(maxsize=4)
def mask_of(feature, H, T, dtype, device):
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)
    if feature == "window":
        return (i - j).abs() <= WINDOW
    return (-slopes_of(H, device)[:, None, None] * (i - j).abs()).to(dtype)


def eager(query, key, value, *, feature):
    _, H, T, D = query.shape
    if feature == "softcap":
        scores = query @ key.mT * D**-0.5
        return (SOFTCAP * torch.tanh(scores / SOFTCAP)).softmax(-1) @ value
    mask = mask_of(feature, H, T, query.dtype, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def call(query, key, value, *, feature):
    fields = {
        "window": lambda: {"window": (WINDOW, WINDOW)},
        "alibi": lambda: {"alibi_slopes": slopes_of(query.shape[1], query.device)},
        "softcap": lambda: {"softcap": SOFTCAP},
    }
    return (query, key, value), {"variant": sk.AttentionVariant(**fields[feature]())}


def flops_forward(B, H, T, D, *, s, feature):
    """Two products of 2 * T * T * D; in a window of the keys that are seen."""
    keys = min(2 * WINDOW + 1, T) if feature == "window" else T
    return 4 * B * H * T * keys * D


BENCHMARK = Benchmark(
    op="scaled_dot_product_attention",
    shapes={
        "cpu": [(4, 12, 512, 64), (2, 12, 1024, 64)],
        "cuda": [(4, 16, 4096, 128), (8, 16, 2048, 64)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=({"feature": "window"}, {"feature": "alibi"}, {"feature": "softcap"}),
    flops_forward=flops_forward,
    flops_backward=lambda *shape, **variant: 2.5 * flops_forward(*shape, **variant),
    gate_shape=lambda shape: (1, 2, min(shape[2], 512), shape[3]),
)
