"""Accuracy from the loss's own pass: which labels cross_entropy and linear_cross_entropy find to be
the argmax of their logits."""

import pytest
import torch
from op_cases import DTYPES, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from slimkernels.testing import run_with_gradients

INF, NAN = float("inf"), float("nan")
V = 9001  # several segments of the CPU's kernel, several parts and blocks of Triton's
# Logits that stand out in a row of zeros, the label, and whether it is the argmax.
ROWS = {
    "alone": ({8999: 1.0}, 8999, True),
    "below": ({8999: 1.0, 17: 0.5}, 17, False),
    "first of two in one segment": ({5000: 1.0, 5001: 1.0}, 5000, True),
    "second of two in one segment": ({5000: 1.0, 5001: 1.0}, 5001, False),
    "first of two far apart": ({3: 1.0, 8998: 1.0}, 3, True),
    "second of two far apart": ({3: 1.0, 8998: 1.0}, 8998, False),
    "first of all zeros": ({}, 0, True),
    "first of a segment": ({4095: -1.0}, 4096, False),
    "infinite": ({70: INF, 8000: INF}, 70, True),
    "infinite, but later": ({70: INF, 8000: INF}, 8000, False),
    "beside NaN": ({70: INF, 8000: NAN}, 70, False),
    "NaN": ({70: INF, 8000: NAN}, 8000, True),
    "the first NaN": ({70: NAN, 8000: NAN}, 70, True),
    "the second NaN": ({70: NAN, 8000: NAN}, 8000, False),
    "nothing above -inf": (dict.fromkeys(range(V), -INF), 0, True),
    "nothing above -inf, but later": (dict.fromkeys(range(V), -INF), 1, False),
}
every_backend = pytest.mark.parametrize("backend", ["triton", "cuda", "cpu", "torch"])


def argmax_is(logits, target, ignore_index=-100):
    """The definition, by hand."""
    return (logits.argmax(-1) == target) & (target != ignore_index)


@pytest.mark.parametrize("at_once", [1, len(ROWS)], ids=["parts", "whole rows"])
@pytest.mark.parametrize("softcap", [None, 0.01], ids=["", "softcap"])
@every_backend
def test_ties_and_what_is_not_finite(backend, softcap, at_once):
    x = torch.zeros(len(ROWS), V, device=device_of(backend))
    for row, (logits, _, _) in zip(x, ROWS.values(), strict=True):
        for column in (logits, {}) if len(logits) == V else (logits,):
            row[list(column)] = torch.tensor(list(column.values()), device=x.device)
    target = torch.tensor([label for _, label, _ in ROWS.values()], device=x.device)
    expected = torch.tensor([is_correct for *_, is_correct in ROWS.values()], device=x.device)
    assert torch.equal(argmax_is(x, target), expected)
    how = dict(softcap=softcap, reduction="none", return_correct=True, backend=backend)
    skip_unsupported("cross_entropy", backend, x, target)
    correct = torch.cat(
        [
            sk.cross_entropy(a, b, **how)[1]
            for a, b in zip(x.split(at_once), target.split(at_once), strict=True)
        ]
    )
    wrong = [name for name, same in zip(ROWS, correct == expected, strict=True) if not same]
    assert correct.dtype == torch.bool and not wrong


@pytest.mark.parametrize(
    "reduction, dtype", [("none", torch.float32), ("mean", torch.bfloat16), ("sum", torch.float16)]
)
@every_backend
def test_beside_the_loss_and_lse(backend, dtype, reduction):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (4, 6, 3), device=device_of(backend)).to(dtype)  # ties are many
    target = torch.randint(6, (4, 3), device=x.device)
    # Ignored is a class that a row which nobody reads might be taken for.
    target[2], x[2, 0] = 0, NAN
    how = dict(ignore_index=0, reduction=reduction, backend=backend)
    skip_unsupported("cross_entropy", backend, x, target)

    def results(**wanted):
        leaf = x.clone().requires_grad_()
        tensors = sk.cross_entropy(leaf, target, **how, **wanted)
        tensors = tensors if wanted else (tensors,)
        loss = tensors[0].sum() + (tensors[1].sum() if "return_lse" in wanted else 0.0)
        return *(t.detach() for t in tensors), torch.autograd.grad(loss, leaf)[0]

    loss, dx = results()
    loss_too, correct, dx_too = results(return_correct=True)
    assert torch.equal(loss_too, loss) and torch.equal(dx_too, dx)
    assert torch.equal(correct, argmax_is(x.movedim(1, -1), target, 0))
    assert correct.any() and not correct.all()
    _, lse, dx = results(return_lse=True)
    _, lse_too, same, dx_too = results(return_lse=True, return_correct=True)
    assert torch.equal(lse_too, lse) and torch.equal(dx_too, dx) and torch.equal(same, correct)


def integers(backend, dtype, N=20, C=8, V=150):
    """Hidden states and a matrix whose products are exact, so that ties are ties everywhere."""
    torch.manual_seed(0)
    x = torch.randint(-1, 2, (N, C), device=device_of(backend)).to(dtype)
    weight = torch.randint(-1, 2, (V, C), device=x.device).to(dtype)
    target = (x @ weight.t()).argmax(-1)  # right, but for every third, and two that are ignored
    target[::3] = torch.randint(V, target[::3].shape, device=x.device)
    target[4], target[9], x[4] = -100, -100, NAN
    return x, weight, target


@pytest.mark.parametrize("parts", [8, 2], ids=["one tile a part", "tiles"])
@pytest.mark.parametrize("how", [{}, dict(softcap=0.5), dict(reduction="none")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_of_a_linear_layer(backend, dtype, how, parts, monkeypatch):
    kernels = LINEAR_CROSS_ENTROPY.modules.get(backend)
    if hasattr(kernels, "CHUNK"):
        monkeypatch.setattr(kernels, "CHUNK", 7 * 4 * 150)  # of a few rows
        monkeypatch.setattr(kernels, "PARTS", parts, raising=False)
    x, weight, target = integers(backend, dtype)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)
    weight.requires_grad_()
    loss, correct = sk.linear_cross_entropy(
        x, weight, target, **how, return_correct=True, backend=backend
    )
    assert torch.equal(correct, argmax_is(x @ weight.t(), target))
    assert correct.any() and not correct.all()
    assert not correct.requires_grad and torch.equal(
        loss, sk.linear_cross_entropy(x, weight, target, **how, backend=backend)
    )
    loss.sum().backward()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_compiled_whole(backend):
    x, weight, target = integers(backend, torch.float32)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)

    def both(x, weight):
        how = dict(return_correct=True, backend=backend)
        loss, correct = sk.linear_cross_entropy(x, weight, target, **how)
        other, lse, too = sk.cross_entropy(x @ weight.t(), target, return_lse=True, **how)
        assert not correct.requires_grad
        return loss + other + lse.sum() + 0.0 * (correct & too).sum()

    eager = run_with_gradients(both, (x.nan_to_num(), weight))
    compiled = run_with_gradients(maybe_compiled(both, True), (x.nan_to_num(), weight))
    for name, expected in eager.items():
        assert torch.equal(compiled[name], expected), name
