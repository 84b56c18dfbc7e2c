"""What the files of softmax's tests share: kinds of calls, eager softmax, and the comparison."""

from __future__ import annotations

import pytest
import torch
from op_cases import KERNEL_BACKENDS, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.testing import assert_op_matches

FOUR = (2, 3, 5, 34)
KINDS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "mask": {"mask": True},
    "causal": {"is_causal": True},
    "mask+causal": {"scale": -0.5, "mask": True, "is_causal": True},
}
every_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)
every_kind = pytest.mark.parametrize("kind", KINDS)
# Triton's rows in registers, and in short blocks: the loop that long rows take.
every_backend_and_cut = pytest.mark.parametrize(
    "backend, cut",
    [*((backend, "whole") for backend in KERNEL_BACKENDS), ("triton", "blocks")],
    indirect=["cut"],
)


def inputs_of(shape, dtype, device, mean=0.0, spread=1.0):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device)
    # Ties: without them each row of extreme scores has one winner, and next to no gradient.
    x = x.round() if spread > 100 else x
    return x.mul(spread).add(mean).to(dtype)


def options_of(kind, shape, device):
    """The keywords of a kind; its mask hides all of some rows."""
    options = dict(KINDS[kind])
    if "mask" in options:
        torch.manual_seed(1)
        options["mask"] = torch.rand(shape, device=device) < 0.7
        options["mask"][..., -1:, :] &= shape[-1] % 2 == 0
    return options


def eager_softmax(x, dim=-1, *, scale=1.0, mask=None, is_causal=False):
    """What a user of plain PyTorch writes."""
    x = x if scale == 1.0 else x * scale
    if is_causal:
        causal = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        mask = causal if mask is None else mask & causal
    if mask is None:
        return torch.softmax(x, dim)
    mask = mask.expand(x.shape)
    y = torch.softmax(x.masked_fill(~mask, -float("inf")), dim)
    return y.masked_fill(~mask.any(dim, keepdim=True), 0.0)


def check(backend, x, options, compiled=False):
    skip_unsupported("softmax", backend, x, **options)

    def ours(x):
        return sk.softmax(x, **options, backend=backend)

    def eager(x):
        return eager_softmax(x, **options)

    def reference(x):
        return sk.softmax(x, **options, backend="torch")

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, (x,))
