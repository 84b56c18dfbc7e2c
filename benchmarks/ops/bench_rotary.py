"""Rotary position embedding of query and key, as Hugging Face's models write it."""

import functools

import torch

import slimkernels
from benchmarks.harness import Benchmark


@functools.cache
def tables(T, D, device):
    return slimkernels.rotary_tables(T, D, device=device)


@functools.cache
def whole_tables(T, D, device, dtype):
    """As Hugging Face has them: in the model's dtype, a column an element."""
    return tuple(torch.cat((t, t), -1).to(dtype) for t in tables(T, D, device))


def inputs(shape, dtype, device):
    """Parts of one packed projection."""
    B, H, T, D = shape
    query, key, _ = torch.randn(B, T, 3, H, D, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    return query, key


def eager(query, key):
    cos, sin = whole_tables(*query.shape[2:], query.device, query.dtype)

    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turned(query), turned(key)


def call(query, key):
    return (query, key, *tables(*query.shape[2:], query.device)), {}


BENCHMARK = Benchmark(
    op="rotary",
    shapes={
        "cpu": [(8, 12, 128, 64), (4, 12, 512, 64), (1, 32, 2048, 128)],
        "cuda": [(8, 32, 2048, 128), (1, 32, 8192, 128), (32, 12, 512, 64)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    bytes_forward=lambda B, H, T, D, *, s: 4 * B * H * T * D * s,  # query, key, in and out
    bytes_backward=lambda B, H, T, D, *, s: 4 * B * H * T * D * s,
)
