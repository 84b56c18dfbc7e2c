"""linear_cross_entropy of some rows of its input, and what it may not know of them: how many are
kept, and on a GPU whether labels and positions are in range."""

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, device_of, maybe_compiled, skip_unsupported
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import slimkernels as sk
from slimkernels.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from slimkernels.testing import assert_op_matches, run_with_gradients

BACKENDS = ["triton", "cpu"]
POSITIONS = [7, 2, 2, 11, 0, 7, 5]  # in no order, and some twice
both_backends = pytest.mark.parametrize("backend", BACKENDS)


def inputs_of(backend, dtype=torch.float32):
    torch.manual_seed(0)
    device = device_of(backend)
    x, weight = torch.randn(3, 4, 24, device=device), torch.randn(37, 24, device=device)
    target = torch.randint(37, (len(POSITIONS),), device=device)
    target[3] = -100
    positions = torch.tensor(POSITIONS, device=device)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target, positions=positions)
    return (
        x.to(dtype),
        weight.to(dtype),
        torch.randn(37, device=device).to(dtype),
        target,
        positions,
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_matches_the_gathered_rows(backend, dtype, reduction, monkeypatch):
    kernels = LINEAR_CROSS_ENTROPY.modules.get(backend)
    if hasattr(kernels, "CHUNK"):
        monkeypatch.setattr(kernels, "CHUNK", 4 * 4 * 37)  # of a few rows
    x, weight, bias, target, positions = inputs_of(backend, dtype)
    x[0, 1], x[2, 3] = float("nan"), float("inf")  # which nobody reads: 11 is ignored

    def ours(x, weight, bias):
        return sk.linear_cross_entropy(
            *(x, weight, target, bias),
            positions=positions.int(),
            reduction=reduction,
            backend=backend,
        )

    def eager(x, weight, bias):
        rows = x.flatten(0, 1)[positions].masked_fill((target == -100).unsqueeze(1), 0.0)
        return F.cross_entropy(F.linear(rows, weight, bias), target, reduction=reduction)

    assert_op_matches(ours, eager, eager, (x, weight, bias))
    first, second = (run_with_gradients(ours, (x, weight, bias)) for _ in range(2))
    assert all(torch.equal(second[name], first[name]) for name in first)


@both_backends
def test_no_position_and_compiled_whole(backend):
    x, weight, bias, target, positions = inputs_of(backend)

    def ours(x, weight, bias, target, positions):
        how = dict(positions=positions, reduction="sum", backend=backend)
        return sk.linear_cross_entropy(x, weight, target, bias, **how)

    eager = run_with_gradients(ours, (x, weight, bias, target, positions))
    compiled = run_with_gradients(maybe_compiled(ours, True), (x, weight, bias, target, positions))
    for name, expected in eager.items():
        assert torch.equal(compiled[name], expected), name
    nothing = run_with_gradients(ours, (x, weight, bias, target[:0], positions[:0]))
    assert all(t.eq(0).all() for t in nothing.values())


@both_backends
def test_compiled_code_checks_labels_and_positions_on_the_cpu(backend):
    x, weight, bias, target, positions = inputs_of(backend)
    if not x.is_cpu:
        pytest.skip("on a GPU looking would wait for the device")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def linear(target, positions):
        return sk.linear_cross_entropy(x, weight, target, positions=positions, backend=backend)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def plain(target):
        return sk.cross_entropy(weight, target, backend=backend)

    linear(target, positions), plain(positions.repeat(6)[:37])
    for call, sentence in (
        (lambda: linear(target + 37, positions), r"target must be in \[0, 37\) or .* at position"),
        (lambda: linear(target, positions + 1), r"positions must be in \[0, 12\), .*; got 12"),
        (lambda: linear(target, positions - 1), r"positions must be in \[0, 12\), .*; got -1"),
        (lambda: plain(torch.full((37,), 24)), r"target must be in \[0, 24\) or .*; got 24 at"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_positions_that_nobody_checked_touch_no_other_memory(reduction):
    # As on a GPU. The interpreter checks each address.
    x, weight, bias, target, positions = inputs_of("triton")
    *tensors, _, _, _, _, _, _, _ = LINEAR_CROSS_ENTROPY.arguments(
        x, weight, target, bias, positions=positions
    )
    positions[0], positions[3], positions[6] = 12, 2**40, -1  # of which the second is ignored
    tensors[4] = positions
    kernels, numbers = LINEAR_CROSS_ENTROPY.modules["triton"], (-100, 0.0, 0.0, 0.0)
    loss, stats, divisor, correct, *_ = kernels.forward(
        *tensors, *numbers, True, reduction, [True] * 3
    )
    assert loss[[0, 6]].isnan().all() if reduction == "none" else loss.isnan()
    assert not correct[[0, 3, 6]].any()
    dx, *_ = kernels.backward(
        torch.ones_like(loss), *tensors, stats, divisor, *numbers, reduction, [True] * 3
    )
    assert dx[2].isfinite().all() and (dx[1] == 0).all()


class NeverRun:
    """Stands for a kernel, where only what torch does around it matters."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("with_positions", [True, False], ids=["positions", ""])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nobody_waits_for_the_device(reduction, with_positions, monkeypatch):
    """Fake tensors have no values: to ask for one, or for as many rows as are kept, is an error."""
    *tensors, target, positions = inputs_of("triton")
    x, weight, bias = tensors[0].flatten(0, 1), *tensors[1:]
    name = "slimkernels.backends.triton."
    for kernel in ("_parts_kernel", "_dlogits_kernel", "finish_kernel"):
        monkeypatch.setattr(name + "linear_cross_entropy." + kernel, NeverRun())
    for kernel in ("_linear_products.dx_kernel", "_linear_products.dweight_kernel"):
        monkeypatch.setattr(name + kernel, NeverRun())
    monkeypatch.setattr(name + "_cross_entropy.total_kernel", NeverRun())
    kernels, numbers = LINEAR_CROSS_ENTROPY.modules["triton"], (-100, 0.1, 0.0, 0.0)
    with FakeTensorMode() as fake:
        given = [fake.from_tensor(t) for t in (x, weight, target, bias, positions)]
        if not with_positions:
            given = [given[0][: len(POSITIONS)], *given[1:4], None]
        loss, stats, divisor, correct, *_ = kernels.forward(
            *given, *numbers, True, reduction, [True] * 3
        )
        kernels.backward(loss, *given, stats, divisor, *numbers, reduction, [True] * 3)
        with pytest.raises(DynamicOutputShapeException):
            given[2].nonzero()
