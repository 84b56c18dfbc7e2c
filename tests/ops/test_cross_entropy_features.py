"""What cross_entropy adds to logits and labels: weights, z-loss, softcap, probabilities, lse."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
)

import slimkernels as sk
from slimkernels.ops.cross_entropy import (
    CROSS_ENTROPY,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_reference,
)
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

REDUCTIONS = ["none", "mean", "sum"]
FEATURES = {
    "weight": dict(weight=True),
    "weight and smoothing": dict(weight=True, label_smoothing=0.1),
    "z-loss": dict(z_loss=0.01),
    "softcap": dict(softcap=3.0),
    "all": dict(weight=True, label_smoothing=0.2, z_loss=0.01, softcap=3.0),
}
SPREAD = {
    "probabilities": {},
    "probabilities, weight and smoothing": dict(weight=True, label_smoothing=0.3),
    "probabilities, z-loss and softcap": dict(z_loss=0.01, softcap=2.0),
}


def inputs_of(shape, dtype, device, spread=2.0, probabilities=False):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).mul(spread).to(dtype)
    if probabilities:
        return x, torch.rand(shape, device=device).softmax(1)
    target = torch.randint(shape[1], shape[:1] + shape[2:], device=device)
    target[1:2] = -100
    return x, target


def options_of(features, V, device):
    how = dict(features)
    if how.pop("weight", False):
        generator = torch.Generator().manual_seed(1)
        how["weight"] = (torch.rand(V, generator=generator) + 0.5).to(device)
    return how


def definition(x, target, return_lse=False, softcap=None, weight=None, **how):
    """The op in torch, differentiable, in x's own width."""
    rows = x.movedim(1, -1)
    flat = target.movedim(1, -1).flatten(0, -2) if target.is_floating_point() else target.flatten()
    loss, lse = cross_entropy_reference(
        rows.flatten(0, -2), flat, weight, softcap=softcap or 0.0, **how
    )
    if how["reduction"] == "none":
        loss = loss.view(rows.shape[:-1])
    return (loss, lse.view(rows.shape[:-1])) if return_lse else loss


def check(backend, x, target, features, reduction, compiled=False, return_lse=False):
    how = options_of(features, x.shape[1], x.device) | dict(reduction=reduction)
    skip_unsupported("cross_entropy", backend, x, target, **how)

    def ours(x):
        return sk.cross_entropy(x, target, **how, return_lse=return_lse, backend=backend)

    def eager(x):
        return definition(x, target, return_lse, **how)

    assert_op_matches(maybe_compiled(ours, compiled), eager, eager, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_features(backend, features, reduction, dtype):
    for shape in [(11, 53), (2, 5, 3), (1, 1), (0, 4)]:
        check(backend, *inputs_of(shape, dtype, device_of(backend)), features, reduction)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_long_rows(backend, features):
    inputs = inputs_of((3, 9001), torch.float32, device_of(backend))
    check(backend, *inputs, features, "mean")


@pytest.mark.parametrize("target_dtype", [torch.float32, None], ids=["float32", "as input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("features", SPREAD.values(), ids=SPREAD)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_probabilities(backend, features, reduction, dtype, target_dtype):
    for shape in [(11, 53), (2, 5, 3), (3, 1), (0, 4), (2, 4101)]:
        if shape[1] > 1000 and reduction != "mean":
            continue
        x, target = inputs_of(shape, dtype, device_of(backend), probabilities=True)
        check(backend, x, target.to(target_dtype or dtype), features, reduction)


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("features", [{}, FEATURES["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_lse_and_its_gradient(backend, features, reduction, probabilities):
    for shape in [(6, 21), (2, 5, 3)]:
        inputs = inputs_of(shape, torch.float32, device_of(backend), probabilities=probabilities)
        check(backend, *inputs, features, reduction, return_lse=True)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_gradient_of_lse_alone(backend, reduction):
    x, target = inputs_of((6, 21), torch.float32, device_of(backend))
    skip_unsupported("cross_entropy", backend, x, target)

    def ours(x):
        return sk.cross_entropy(x, target, reduction=reduction, return_lse=True, backend=backend)[1]

    def eager(x):
        return torch.logsumexp(x, 1).where(target != -100, 0)

    assert_op_matches(ours, eager, eager, (x,))
    assert ours(x).dtype == torch.float32 and not ours(x).requires_grad


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_compiled_whole(backend, probabilities):
    inputs = inputs_of((5, 37), torch.float32, device_of(backend), probabilities=probabilities)
    check(backend, *inputs, FEATURES["all"], "mean", compiled=True, return_lse=True)


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_registered_ops(backend, probabilities):
    x, target = inputs_of((5, 37), torch.float32, device_of(backend), probabilities=probabilities)
    how = dict(weight=torch.rand(37, device=x.device), z_loss=0.1, softcap=5.0)
    skip_unsupported("cross_entropy", backend, x, target, **how)
    args = CROSS_ENTROPY.arguments(x, target, **how)
    torch.library.opcheck(cross_entropy_forward.op, (*args, backend))
    loss, *saved, _ = cross_entropy_forward(*args, backend)
    dlse = torch.rand(5, device=x.device)
    arguments = loss, dlse, *args[:3], *saved, *args[3:-1], backend
    torch.library.opcheck(cross_entropy_backward.op, arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_many_rows(backend, reduction, monkeypatch):
    kernels = CROSS_ENTROPY.modules[backend]
    if hasattr(kernels, "SUMMED"):  # many for smaller blocks: the interpreter is slow
        monkeypatch.setattr(kernels, "ROWS", 32)
        monkeypatch.setattr("slimkernels.backends.triton._cross_entropy.SUMMED", 16)
    inputs = inputs_of((75, 6), torch.float32, device_of(backend))
    check(backend, *inputs, FEATURES["all"], reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_ignored_rows_are_not_read(backend, reduction):
    x, target = inputs_of((6, 9), torch.float32, device_of(backend))
    x[1] = float("inf")
    how = options_of(FEATURES["all"], 9, x.device) | dict(reduction=reduction, return_lse=True)
    skip_unsupported("cross_entropy", backend, x, target, **how)
    results = run_with_gradients(
        lambda x: sk.cross_entropy(x, target, **how, backend=backend), (x,)
    )
    assert all(result.isfinite().all() for result in results.values())
    assert results["gradient 0"][1].eq(0).all() and results["output 1"][1] == 0


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("V", [20, 9001])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_logits_that_are_not_finite(backend, V, probabilities):
    inf = float("inf")
    x, target = inputs_of((6, V), torch.float32, device_of(backend), probabilities=probabilities)
    x[0, 5], x[2, 5], x[3, 5] = float("nan"), inf, -inf
    x[4] = -inf
    x[5, : V - 1] = -inf  # whole parts of the row
    for features in ({}, dict(weight=True, z_loss=0.01), dict(label_smoothing=0.1, softcap=2.0)):
        check(backend, x, target, features, "none")


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
def test_every_instruction_set_and_number_of_threads(each_isa, probabilities):
    threads = torch.get_num_threads()
    x, target = inputs_of((3, 30011), torch.bfloat16, "cpu", probabilities=probabilities)
    how = options_of(FEATURES["all"], x.shape[1], "cpu")
    for isa in each_isa():
        check("cpu", x, target, FEATURES["all"], "mean")
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run_with_gradients(lambda x: sk.cross_entropy(x, target, **how), (x,)))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            assert torch.equal(results[1][name], expected), (isa, name)


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_definition_is_torchs(reduction, probabilities, smoothing):
    x, target = inputs_of((4, 5), torch.float64, "cpu", probabilities=probabilities)
    target = target.double() if probabilities else target
    how = dict(reduction=reduction, label_smoothing=smoothing, weight=torch.rand(5).double())
    theirs = F.cross_entropy(x, target, **how)
    assert_rounding_alone(definition(x, target, **how), theirs, terms=5)
    assert torch.equal(sk.cross_entropy(x, target, **how), theirs)


def test_the_definition_of_z_loss_and_softcap():
    x, target = torch.tensor([[1.0, 30.0], [2.0, -1.0]]).double(), torch.tensor([0, 1])
    weight = torch.tensor([1.0, 3.0]).double()
    capped = 2 * torch.tanh(x / 2)
    lse = capped.exp().sum(1).log()
    rows = weight * (lse - capped[[0, 1], [0, 1]] + 0.1 * lse**2)
    how = dict(weight=weight, z_loss=0.1, softcap=2.0)
    loss, given = sk.cross_entropy(x, target, **how, return_lse=True)
    assert_rounding_alone(loss, rows.sum() / 4, terms=2)
    assert_rounding_alone(given, lse, terms=2)


def test_gradient_of_probabilities_is_torchs():
    x, target = inputs_of((4, 5), torch.float32, "cpu", probabilities=True)
    target.requires_grad_()
    assert "target's probabilities" in sk.explain(sk.cross_entropy, x, target)
    for how in ({}, dict(z_loss=0.1)):
        ours = torch.autograd.grad(sk.cross_entropy(x, target, **how), target)[0]
        theirs, truth = (
            torch.autograd.grad(F.cross_entropy(x.to(dtype), target.to(dtype)), target)[0]
            for dtype in (torch.float32, torch.float64)
        )
        assert_no_worse(ours, theirs, truth)


X, T, W = torch.randn(4, 8), torch.tensor([0, 7, -100, 3]), torch.ones(8)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(weight=[1.0]), "weight must be a tensor; got list"),
        (dict(weight=W[:3]), r"weight must have shape \(8,\), the classes of input .*; got \(3,\)"),
        (dict(weight=W.to("meta")), "weight must be on cpu like input; got meta"),
        (dict(weight=W.half()), "weight must be torch.float32 like input, or float32; got .*16"),
        (dict(weight=W.clone().requires_grad_()), "weight must not require a gradient"),
        (dict(target=X[:3]), r"target, of probabilities, .* shape \(4, 8\); got \(3, 8\)"),
        (dict(target=X.half()), "target, of probabilities, must be torch.float32 like input, or"),
        (dict(target=X.to("meta")), "target must be on cpu like input; got meta"),
        (dict(target=X, ignore_index=0), "ignore_index must be negative where target holds"),
        (dict(z_loss="a"), "z_loss must be a number; got 'a'"),
        (dict(z_loss=-1.0), "z_loss must be at least 0; got -1.0"),
        (dict(softcap=float("nan")), "softcap must be finite"),
        (dict(softcap=0.0), "softcap must be None or above 0; got 0.0"),
        (dict(return_lse=1), "return_lse must be True or False; got 1"),
        (dict(return_correct=1), "return_correct must be True or False; got 1"),
        (dict(target=X, return_correct=True), "return_correct must be False where target holds"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, arguments, sentence):
    arguments = {"input": X, "target": T, **arguments}
    with pytest.raises(ValueError, match="^cross_entropy: " + sentence):
        sk.cross_entropy(**arguments, backend=backend)
