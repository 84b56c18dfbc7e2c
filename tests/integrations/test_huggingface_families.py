"""replace() on Hugging Face's families: nobody's numbers change."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_families import FAMILIES, LENGTHS, B, L

import slimkernels
from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")
from slimkernels.integrations._hf_blocks import clamped_where_overflown

# Sums of a few dozen terms in another order, through a few layers.
ULPS = 16


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


def _rounded(model, dtype):
    """A copy with parameters that `dtype` can hold, in float64."""
    return copy.deepcopy(model).to(dtype).double()


def _compare(ours, eager, truth, what, smallest=0.0):
    largest = max(truth.abs().max().item(), smallest)
    assert_no_worse(
        ours, eager, truth, floor=ULPS * torch.finfo(eager.dtype).eps * largest, what=what
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_loss_and_gradients_are_those_of_the_model_itself(name, packings):
    family = FAMILIES[name]
    model, batch = family.make().train(), family.inputs()
    truth = _run(copy.deepcopy(model).double(), batch, torch.float64)
    eager = _run(model, batch, torch.float32)
    keys = list(model.state_dict())

    report = slimkernels.replace(model)
    swapped = {row.detail.rpartition(".")[2] for row in report.swapped}
    if any("padding is left out" in row.detail for row in report.swapped):
        swapped.add("Stack")
    assert set(family.swapped) <= swapped, f"only {sorted(swapped)}"
    ours = _run(model, batch, torch.float32)

    assert list(model.state_dict()) == keys
    assert bool(packings) == family.packs
    for what, *three in zip(("output", "loss"), ours, eager, truth, strict=False):
        _compare(*three, what)
    assert ours[2].keys() == eager[2].keys()
    # A key's bias changes no softmax: its gradient is nothing but the rounding of others.
    smallest = 1e-2 * max(g.abs().max().item() for g in truth[2].values())
    for parameter in ours[2]:
        three = (run[2][parameter] for run in (ours, eager, truth))
        _compare(*three, f"d {parameter}", smallest)


@pytest.mark.parametrize("name", ["bert-mlm", "llama"])
def test_bfloat16_errs_no_more_than_the_model_itself(name):
    family = FAMILIES[name]
    model, batch = family.make().train(), family.inputs()
    truth = _run(_rounded(model, torch.bfloat16), batch, torch.float64)
    model.to(torch.bfloat16)
    eager = _run(model, batch, torch.bfloat16)
    slimkernels.replace(model)
    ours = _run(model, batch, torch.bfloat16)
    ulp = torch.finfo(torch.bfloat16).eps  # the loss itself is float32, and a single number
    for what, *three in zip(("output", "loss"), ours, eager, truth, strict=False):
        assert_no_worse(*three, floor=ulp * three[2].abs().max().item(), what=what)
    for parameter in ours[2]:
        mine, theirs, exact = (run[2][parameter] for run in (ours, eager, truth))
        # The largest error of a few numbers is chance: their sum is not.
        error, allowed = ((g - exact).norm() for g in (mine.double(), theirs.double()))
        floor = ulp * max(exact.norm(), 1e-2)
        assert error <= 2 * allowed + floor, f"d {parameter}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.generates])
def test_generates_the_same_tokens(name):
    family = FAMILIES[name]
    model = family.make().eval()
    batch = {n: t for n, t in family.inputs().items() if n != "labels"}
    prompts = [batch]
    if not model.config.is_encoder_decoder:  # padded on the left, and not at all
        alone = {n: t[:1] for n, t in batch.items()}
        prompts = [{n: t.flip(1) for n, t in batch.items()}, alone]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = [model.generate(**prompt, **options) for prompt in prompts]
    slimkernels.replace(model)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert torch.equal(model.generate(**prompt, **options), tokens)


@pytest.mark.parametrize("rate", ["dropout", "activation_dropout"])
@pytest.mark.parametrize("name", ["bert-mlm", "bart", "pegasus"])
def test_dropout_is_applied_in_training_alone(name, rate):
    """Inside the fused layers, that is: nothing else drops out here."""
    family = FAMILIES[name]
    model, batch = family.make(), family.inputs()
    slimkernels.replace(model)
    for module in model.modules():
        if hasattr(module, "intermediate"):  # BertLayer
            module.attention.output.dropout.p = module.output.dropout.p = 0.5
        elif hasattr(module, "activation_dropout"):  # of BART and Pegasus
            setattr(module, rate, 0.5)
    model.train()

    def loss(seed):
        torch.manual_seed(seed)
        return model(**batch).loss.detach()

    assert loss(0) == loss(0) and torch.stack([loss(seed) for seed in range(4)]).std() > 1e-3
    model.eval()
    assert loss(0) == loss(1)


@pytest.mark.parametrize("name", ["bert-mlm", "bart", "llama"])
def test_autocast(name):
    family = FAMILIES[name]
    model, batch = family.make().train(), family.inputs()

    def losses(model):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return output.loss.detach(), output.logits.dtype, gradients

    truth = _run(copy.deepcopy(model).double(), batch, torch.float64)
    eager = losses(copy.deepcopy(model))
    slimkernels.replace(model)
    ours = losses(model)
    assert ours[1] == eager[1]
    ulp = torch.finfo(torch.bfloat16).eps
    assert_no_worse(ours[0], eager[0], truth[1], floor=ulp * truth[1].item(), what="loss")
    for mine, theirs, exact in zip(ours[2], eager[2], truth[2].values(), strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = ((g - exact).norm() for g in (mine, theirs))
        assert error <= 2 * allowed + ulp * max(exact.norm(), 1e-2)


@pytest.mark.parametrize("largest", [65504.0, float("inf"), float("nan")])
def test_half_precision_is_clamped_only_where_something_overflowed(largest):
    x = torch.tensor([65000.0, -65000.0, 1.0, largest], dtype=torch.float16, requires_grad=True)
    expected = x
    if not torch.isfinite(x).all():  # as transformers asks, waiting for the device
        limit = torch.finfo(x.dtype).max - 1000
        expected = x.clamp(-limit, limit)
    actual = clamped_where_overflown(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    dy = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    (result,), (truth,) = (torch.autograd.grad(y, x, dy) for y in (actual, expected))
    assert torch.equal(result, truth)
