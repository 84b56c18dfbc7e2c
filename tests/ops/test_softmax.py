import pytest
import torch
from op_cases import DTYPES, device_of, skip_unsupported
from softmax_cases import (
    check,
    eager_softmax,
    every_backend,
    every_backend_and_cut,
    every_kind,
    inputs_of,
    options_of,
)

import slimkernels as sk
from slimkernels.testing import assert_no_worse, run_with_gradients

SHAPES = [(1, 1), (3, 7), (9, 1), (2, 3, 5, 33), (4, 70, 65), (2, 5, 769), (0, 8)]


@pytest.mark.parametrize("mean, spread", [(0.0, 1.0), (100.0, 1.0), (0.0, 3e3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_kind
@every_backend
def test_matches_reference(backend, kind, shape, dtype, mean, spread):
    device = device_of(backend)
    x = inputs_of(shape, dtype, device, mean, spread)
    check(backend, x, options_of(kind, shape, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 33), (0, 8)], ids=str)
@every_kind
@every_backend
def test_compiled(backend, kind, shape, dtype):
    device = device_of(backend)
    check(backend, inputs_of(shape, dtype, device), options_of(kind, shape, device), True)


# Past one segment of the CPU kernel, past Triton's tile, and past everyone's.
@pytest.mark.parametrize("shape", [(3, 4097), (5, 16384), (2, 20011), (2, 262147)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["scale", "mask", "causal"])
@every_backend
def test_long_rows(backend, kind, dtype, shape):
    device = device_of(backend)
    options = options_of(kind, shape, device)
    if kind == "mask":
        options["mask"][0, 5000:] = False
        options["mask"][0, :30] = False
    check(backend, inputs_of(shape, dtype, device, 0.0, 3.0), options)


# Blocks of 32 columns: the maximum rises in some, and causality ends before, in and after them.
@pytest.mark.parametrize("shape, spread", [((40, 65), 1.0), ((33, 96), 30.0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", ["blocks"], indirect=True)
@every_kind
def test_triton_blocks(kind, dtype, shape, spread, cut):
    device = device_of("triton")
    x = inputs_of(shape, dtype, device, 0.0, spread)
    check("triton", x, options_of(kind, shape, device))


@pytest.mark.parametrize("scale", [-3.0, -0.125, 0.0, 1e-30, 7.3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_scale(backend, dtype, scale):
    x = inputs_of((50, 37), dtype, device_of(backend), 5.0)
    check(backend, x, {"scale": scale})
    check(backend, x, {"scale": scale, "is_causal": True})


@every_backend
def test_scale_0_shares_evenly(backend):
    x = inputs_of((6, 40), torch.float32, device_of(backend))
    skip_unsupported("softmax", backend, x, scale=0.0)
    y = sk.softmax(x, scale=0.0, backend=backend)
    assert (y == y[0, 0]).all()
    assert abs(y[0, 0].item() * 40 - 1) <= torch.finfo(y.dtype).eps  # a reciprocal's rounding


@pytest.mark.parametrize("Tq, Tk", [(1, 6), (5, 1), (4, 40), (40, 4), (33, 33)])
@pytest.mark.parametrize("masked", [False, True])
@every_backend_and_cut
def test_causal_counts_from_the_top_left(backend, masked, Tq, Tk, cut):
    x = inputs_of((3, Tq, Tk), torch.float32, device_of(backend))
    options = {"is_causal": True}
    if masked:
        options["mask"] = torch.rand(3, 1, Tk, device=x.device) < 0.5
    check(backend, x, options)
    y = sk.softmax(x, **options, backend=backend)
    assert not y.triu(1).any()


# Rows that see nothing, NaN and infinity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(7, 70), (7, 1)], ids=str)
@every_backend_and_cut
def test_a_row_that_sees_nothing_is_zero(backend, sizes, dtype, cut):
    device = device_of(backend)
    x = inputs_of((7, 70), dtype, device)
    mask = torch.ones(sizes, dtype=torch.bool, device=device)
    mask[2], mask[5] = False, False
    x[2], x[5, 3] = -float("inf"), float("nan")
    check(backend, x, {"mask": mask})
    results = run_with_gradients(lambda x: sk.softmax(x, mask=mask, backend=backend), (x,))
    assert not results["output 0"][[2, 5]].any() and not results["gradient 0"][[2, 5]].any()


# Sees nothing by causality and mask together, neither of which hides the whole row.
@every_backend_and_cut
def test_a_causal_row_that_sees_nothing_is_zero(backend, cut):
    x = inputs_of((6, 45), torch.float32, device_of(backend))
    mask = torch.arange(45, device=x.device) > 2
    mask[-1] = False
    options = {"mask": mask, "is_causal": True}
    check(backend, x, options)
    assert not sk.softmax(x, **options, backend=backend)[:3].any()
    options["mask"] = mask & (torch.arange(45, device=x.device) != 20)
    check(backend, x, options)


def check_not_finite(backend, kind, N):
    device = device_of(backend)
    x = inputs_of((8, N), torch.float32, device)
    options = options_of(kind, (8, N), device)
    if "mask" in options:
        options["mask"][:, [3, 5]] = True
        options["mask"][7] = torch.arange(N, device=device) == 5
    inf = float("inf")
    x[0, 0] = x[7, 5] = float("nan")
    x[1, 0], x[2, 1], x[6, 5] = inf, -inf, -inf
    x[3] = -inf
    x[4, : N - 1] = -inf  # whole segments of the row
    x[5, : N - 1], x[5, 3] = -inf, float("nan")
    skip_unsupported("softmax", backend, x, **options)

    def ours(x):
        return sk.softmax(x, **options, backend=backend)

    def eager(x):
        return eager_softmax(x, **options)

    assert_no_worse(ours(x), eager(x), eager(x.double()))
    if kind in ("plain", "scale"):  # elsewhere eager has NaN in the gradient of hidden scores
        results = (
            run_with_gradients(function, (t,))["gradient 0"]
            for function, t in ((ours, x), (eager, x), (eager, x.double()))
        )
        assert_no_worse(*results, what="gradient")


@pytest.mark.parametrize("N", [20, 100])
@every_kind
@every_backend_and_cut
def test_scores_that_are_not_finite(backend, kind, N, cut):
    check_not_finite(backend, kind, N)


@pytest.mark.parametrize("N", [9001, 20011])
@every_kind
@every_backend
def test_scores_of_long_rows_that_are_not_finite(backend, kind, N):
    check_not_finite(backend, kind, N)


@every_backend_and_cut
def test_hidden_scores_are_never_looked_at(backend, cut):
    x = inputs_of((4, 70), torch.float32, device_of(backend))
    mask = torch.rand((4, 70), device=x.device) < 0.5
    mask[1] = torch.arange(70, device=x.device) < 40
    skip_unsupported("softmax", backend, x, mask=mask)

    def ours(x):
        return sk.softmax(x, mask=mask, is_causal=False, backend=backend)

    clean = run_with_gradients(ours, (x,))
    for poison in (float("nan"), float("inf"), 3e38):
        poisoned = run_with_gradients(ours, (x.masked_fill(~mask, poison),))
        for name, expected in clean.items():
            assert torch.equal(poisoned[name], expected), name


# Layout, memory, determinism


@every_backend
def test_non_contiguous_input_and_gradient(backend):
    x = inputs_of((6, 4, 24), torch.float32, device_of(backend))
    mask = torch.rand((6, 1, 24), device=x.device) < 0.7
    skip_unsupported("softmax", backend, x, mask=mask)

    def ours(x):
        return sk.softmax(x, mask=mask, backend=backend)

    dense = run_with_gradients(lambda x: ours(x).transpose(0, 1), (x,))
    strided = run_with_gradients(
        lambda x: sk.softmax(x.transpose(0, 1), mask=mask.transpose(0, 1), backend=backend), (x,)
    )
    for name, expected in dense.items():
        assert torch.equal(strided[name], expected), name
    # sum() sends back one element, expanded.
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(ours(leaf).sum(), leaf)
    # y (1 - sum(y)): what rounding 24 terms leaves of 0.
    assert dx.abs().max() <= 24 * torch.finfo(x.dtype).eps


@every_kind
@every_backend
@pytest.mark.parametrize("shape", [(3, 0), (0, 8), (2, 0, 5), (0, 0)], ids=str)
def test_nothing_at_all(backend, shape, kind):
    device = device_of(backend)
    x = torch.empty(shape, device=device, requires_grad=True)
    options = options_of(kind, shape, device)
    skip_unsupported("softmax", backend, x, **options)
    y = sk.softmax(x, **options, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert y.shape == dx.shape == shape


@pytest.mark.parametrize("shape", [(70, 65), (2, 20011)], ids=str)
@every_kind
@every_backend
def test_same_bits_every_time(backend, kind, shape):
    device = device_of(backend)
    x, options = inputs_of(shape, torch.float32, device), options_of(kind, shape, device)
    skip_unsupported("softmax", backend, x, **options)

    def ours(x):
        return sk.softmax(x, **options, backend=backend)

    first, second = run_with_gradients(ours, (x,)), run_with_gradients(ours, (x,))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_kind
def test_every_instruction_set_and_number_of_threads(each_isa, kind, dtype):
    threads = torch.get_num_threads()
    for shape in [(3, 30011), (7, 130, 97), (50, 3), (2, 34, 34), (8, 34)]:
        options = options_of(kind, shape, "cpu")
        x = inputs_of(shape, dtype, "cpu", 0.0, 20.0)
        for isa in each_isa():
            check("cpu", x, options)

            def ours(x, options=options):
                return sk.softmax(x, **options, backend="cpu")

            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(run_with_gradients(ours, (x,)))
            torch.set_num_threads(threads)
            for name, expected in results[0].items():
                assert all(torch.equal(other[name], expected) for other in results[1:]), (isa, name)


# Their product with x rounds: a walk that did not would find a score above the maximum.
SCALED_SEGMENTS = [((20, 8192), -1, 0.7), ((1024, 64), 0, 0.7), ((2, 600, 64), 1, 0.7)]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scaled_rows_and_columns_of_several_segments(each_isa, dtype):
    for shape, dim, scale in SCALED_SEGMENTS:
        x = inputs_of(shape, dtype, "cpu", 0.0, 30.0)
        for _ in each_isa():
            for log in (False, True):
                check("cpu", x, {"dim": dim, "scale": scale}, log=log)


@pytest.mark.parametrize("dim", [-1, 0])
def test_no_probability_is_above_1(each_isa, dim):
    x = torch.zeros(64, 5000)
    x[0, 0] = 100000.333
    x = x if dim == -1 else x.T.contiguous()
    for isa in each_isa():
        y = sk.softmax(x, dim, scale=0.3, backend="cpu")
        log_y = sk.log_softmax(x, dim, scale=0.3, backend="cpu")
        assert y[0, 0] == 1 and log_y[0, 0] == 0, isa


def test_rows_that_see_nothing_on_every_instruction_set(each_isa):
    x = inputs_of((6, 70), torch.float32, "cpu")
    x[1] = -float("inf")
    x[2, 68] = float("nan")
    mask = torch.rand(6, 70) < 0.5
    mask[0], mask[1:3, 68] = False, True
    eager, truth = (eager_softmax(t, mask=mask) for t in (x, x.double()))
    for _ in each_isa():
        assert_no_worse(sk.softmax(x, mask=mask, backend="cpu"), eager, truth)
