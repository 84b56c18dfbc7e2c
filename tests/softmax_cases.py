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


def eager_softmax(x, dim=-1, *, scale=1.0, mask=None, is_causal=False, sinks=None, log=False):
    """What a user of plain PyTorch writes."""
    dtype = x.dtype
    x = x if scale == 1.0 else x * scale
    if mask is not None and mask.is_floating_point():
        x, mask = x + mask.to(dtype), mask != -float("inf")
    if is_causal:
        causal = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).tril()
        mask = causal if mask is None else mask & causal
    function = torch.log_softmax if log else torch.softmax
    if mask is None and sinks is None:
        return function(x, dim).to(dtype)
    seen = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand(x.shape)
    x = x.masked_fill(~seen, -float("inf"))
    if sinks is not None:
        x = torch.cat((x, sinks[:, None, None].to(x.dtype).expand(*x.shape[:-1], 1)), -1)
    y = function(x, dim)[..., : seen.shape[-1]]
    y = y.masked_fill(~seen, -float("inf")) if log else y
    return y.masked_fill(~seen.any(dim, keepdim=True), -float("inf") if log else 0.0).to(dtype)


def check(backend, x, options, compiled=False, log=False):
    """A call of either op, and x's gradient."""
    check_tensors(backend, {"input": x}, options, compiled, log)


def check_tensors(backend, tensors, options, compiled=False, log=False):
    """A call, and the gradients of all tensors that are floating: input, mask, sinks."""
    op = "log_softmax" if log else "softmax"
    skip_unsupported(op, backend, **tensors, **options)

    def ours(*values):
        return getattr(sk, op)(
            **dict(zip(tensors, values, strict=True)), **options, backend=backend
        )

    def eager(*values):
        named = dict(zip(tensors, values, strict=True))
        return eager_softmax(named.pop("input"), **named, **options, log=log)

    def reference(*values):
        named = dict(zip(tensors, values, strict=True))
        return getattr(sk, op)(**named, **options, backend="torch")

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, tuple(tensors.values()))


def added_mask(sizes, dtype, device):
    """Numbers to be added, of which some are -inf: in the middle, at ends, and all of some rows."""
    torch.manual_seed(2)
    mask = torch.randn(sizes, device=device)
    mask = mask.masked_fill(torch.rand(sizes, device=device) < 0.2, -float("inf"))
    if mask.shape[-1] > 1:
        mask[..., mask.shape[-1] * 3 // 4 :] = -float("inf")
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask[..., 1, :] = -float("inf")
    return mask.to(dtype)
