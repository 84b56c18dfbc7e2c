"""replace() on Hugging Face's families: nobody's numbers change."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_families import FAMILIES, LENGTHS, B, L

import slimkernels
from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")

# Sums of a few dozen terms in another order, through a few layers.
ULPS = 8


def _run(model, batch, dtype):
    """(output at the real tokens, loss, gradients) of one training step."""
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}
    model.zero_grad()
    output = model(**batch)
    main = next(v for k, v in output.items() if k != "loss" and isinstance(v, torch.Tensor))
    loss = output.loss if "loss" in output else None
    if loss is None:
        weight = torch.linspace(-1, 1, main.numel(), dtype=dtype).view_as(main)
        loss = (main * weight).sum()
    loss.backward()
    if main.shape[:2] == (B, L):
        main = main[torch.arange(L) < torch.tensor(LENGTHS)[:, None]]
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return main.detach(), loss.detach(), gradients


def _compare(ours, eager, truth, what, smallest=0.0):
    largest = max(truth.abs().max().item(), smallest)
    assert_no_worse(
        ours, eager, truth, floor=ULPS * torch.finfo(eager.dtype).eps * largest, what=what
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_loss_and_gradients_are_those_of_the_model_itself(name):
    family = FAMILIES[name]
    model, batch = family.make().train(), family.inputs()
    truth = _run(copy.deepcopy(model).double(), batch, torch.float64)
    eager = _run(model, batch, torch.float32)
    keys = list(model.state_dict())

    report = slimkernels.replace(model)
    swapped = {row.detail.rpartition(".")[2] for row in report.swapped}
    assert set(family.swapped) <= swapped, f"only {sorted(swapped)}"
    ours = _run(model, batch, torch.float32)

    assert list(model.state_dict()) == keys
    for what, *three in zip(("output", "loss"), ours, eager, truth, strict=False):
        _compare(*three, what)
    assert ours[2].keys() == eager[2].keys()
    # A key's bias changes no softmax: its gradient is nothing but the rounding of others.
    smallest = 1e-2 * max(g.abs().max().item() for g in truth[2].values())
    for parameter in ours[2]:
        three = (run[2][parameter] for run in (ours, eager, truth))
        _compare(*three, f"d {parameter}", smallest)
