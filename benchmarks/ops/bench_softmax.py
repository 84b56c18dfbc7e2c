"""Softmax of attention scores, scaled: plain, with masks, sinks or dropout; and of columns."""

import torch

from benchmarks.harness import Benchmark


def inputs(shape, dtype, device):
    B, _, _, Tk = shape
    x = torch.randn(shape, device=device).to(dtype)
    lengths = torch.linspace(Tk // 4, Tk, B, device=device).long()
    mask = torch.arange(Tk, device=device) < lengths.view(B, 1, 1, 1)  # (B, 1, 1, Tk)
    return x, mask


def eager(x, mask, *, kind, dropout_p=0.0):
    if kind == "heads":
        return torch.softmax(x, 1)
    scores = x * 0.125
    if kind == "causal":
        mask = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
    if kind in ("padded", "causal"):
        scores = scores.masked_fill(~mask, float("-inf"))
    if kind == "added":
        scores = scores + added(mask, x)
    if kind == "sinks":
        column = sinks(x)[:, None, None].expand(*x.shape[:-1], 1)
        return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    return torch.dropout(torch.softmax(scores, -1), dropout_p, True)


def added(mask, x):
    return mask.to(x.dtype).log()


def sinks(x):
    return torch.linspace(-1, 1, x.shape[1], dtype=x.dtype, device=x.device)


def call(x, mask, *, kind, dropout_p=0.0):
    if kind == "heads":
        return (x, 1), {}
    mask = added(mask, x) if kind == "added" else mask if kind == "padded" else None
    options = {"sinks": sinks(x)} if kind == "sinks" else {}
    options |= {"scale": 0.125, "mask": mask, "is_causal": kind == "causal"}
    return (x,), {**options, "dropout_p": dropout_p}


def gate_shape(shape):
    """2^20 elements or more, which the kernel of heads does not refuse."""
    B, H, Tq, Tk = shape
    return B, min(H, max(2, 2**20 // (B * Tq * Tk))), Tq, Tk


BENCHMARK = Benchmark(
    op="softmax",
    shapes={
        "cpu": [(8, 12, 128, 128), (4, 12, 512, 512)],
        "cuda": [(8, 12, 512, 512), (4, 16, 2048, 2048), (1, 16, 8192, 8192)],
    },
    inputs=inputs,
    eager=eager,
    call=call,
    variants=(
        {"kind": "plain"},
        {"kind": "padded"},
        {"kind": "causal"},
        {"kind": "added"},
        {"kind": "sinks"},
        {"kind": "plain", "dropout_p": 0.1},
        {"kind": "heads"},
    ),
    # Counted whole, also where half of it is masked: eager reads and writes it all. Of dropout only
    # the result, not what is saved.
    bytes_forward=lambda B, H, Tq, Tk, *, s, **kind: 2 * B * H * Tq * Tk * s,  # x, y
    bytes_backward=lambda B, H, Tq, Tk, *, s, **kind: 3 * B * H * Tq * Tk * s,  # dy, y, dx
    gate_shape=gate_shape,
)
