"""Masks that are added, sinks, dropout, and dimensions that are not the last."""

import pytest
import torch
from op_cases import DTYPES, device_of, maybe_compiled, skip_unsupported, with_seed
from softmax_cases import (
    FOUR,
    added_mask,
    check,
    check_tensors,
    eager_softmax,
    every_backend,
    every_backend_and_cut,
    inputs_of,
)

import slimkernels as sk
from slimkernels.backends._mask import mask_columns
from slimkernels.testing import assert_no_worse, run_with_gradients

INF = float("inf")
F32, BF16, F16 = DTYPES


# Masks that are added


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("sizes", [FOUR, (2, 1, 1, 34), (3, 1, 34)], ids=str)
@every_backend
def test_added_mask(backend, sizes, dtypes):
    x = inputs_of(FOUR, dtypes[0], device_of(backend))
    tensors = {"input": x, "mask": added_mask(sizes, dtypes[1], x.device)}
    check_tensors(backend, tensors, {"scale": 0.3, "is_causal": len(sizes) == 3})


# Its gradient is zero but for rounding.
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 5, 1), (1,)], ids=str)
@every_backend
def test_added_mask_with_one_value_a_row(backend, sizes, dtype):
    x = inputs_of(FOUR, dtype, device_of(backend))
    check(backend, x, {"mask": added_mask(sizes, F32, x.device), "scale": 0.3})


@pytest.mark.parametrize("wanted", ["input", "mask"])
@every_backend
def test_added_mask_where_one_gradient_is_wanted(backend, wanted):
    tensors = {"input": inputs_of(FOUR, F32, device_of(backend))}
    tensors["mask"] = added_mask((2, 1, 5, 34), F32, tensors["input"].device)
    skip_unsupported("softmax", backend, **tensors)
    gradients = []
    for choice in ("both", wanted):
        leaves = {
            name: t.clone().requires_grad_(choice in ("both", name)) for name, t in tensors.items()
        }
        y = sk.softmax(**leaves, scale=0.3, backend=backend)
        y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape))
        gradients.append(leaves[wanted].grad)
        assert choice == "both" or all(t.grad is None for n, t in leaves.items() if n != wanted)
    assert_no_worse(*gradients, gradients[0].double(), what=wanted)


# Past a segment of the CPU kernel and Triton's tile; a mask that hides whole segments.
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_added_mask_of_long_rows(backend):
    x = inputs_of((2, 20011), F32, device_of(backend), 0.0, 3.0)
    mask = added_mask((2, 20011), F32, x.device)
    mask[0, :5000], mask[1] = -INF, 0.5
    check_tensors(backend, {"input": x, "mask": mask}, {"scale": 0.3})


@every_backend_and_cut
def test_what_an_added_mask_hides_is_never_looked_at(backend, cut):
    x = inputs_of((4, 70), F32, device_of(backend))
    hidden = torch.rand((4, 70), device=x.device) < 0.5
    hidden[2] = True
    added = torch.zeros_like(x).masked_fill(hidden, -INF)
    skip_unsupported("softmax", backend, x, mask=added)

    def results(x, mask):
        return run_with_gradients(lambda x: sk.softmax(x, mask=mask, backend=backend), (x,))

    expected = results(x, ~hidden)
    for poison in (float("nan"), INF):
        actual = results(x.masked_fill(hidden, poison), added)
        for name, clean in expected.items():
            assert torch.equal(actual[name], clean), name
    assert not expected["output 0"][2].any() and not expected["gradient 0"][2].any()


# Sinks


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "added"])
@every_backend
def test_sinks(backend, kind, dtypes):
    shape = 2, 3, 17, 34
    x = inputs_of(shape, dtypes[0], device_of(backend))
    tensors = {"input": x, "sinks": torch.tensor([0.5, 8.0, -INF], device=x.device).to(dtypes[1])}
    if kind == "mask":  # hides rows that have a sink
        tensors["mask"] = torch.rand(shape, device=x.device) < 0.5
        tensors["mask"][:, :2, 1] = False
    if kind == "added":
        tensors["mask"] = added_mask((2, 1, 1, 34), dtypes[0], x.device)
    check_tensors(backend, tensors, {"scale": 2.0, "is_causal": kind == "causal"})


# The maximum is the sink's, and then rises above it; Tq and H are no powers of two.
@pytest.mark.parametrize("shape", [(3, 2, 6001), (1, 3, 2, 20011), (5, 33, 129)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_sinks_of_long_rows(backend, shape):
    x = inputs_of(shape, F32, device_of(backend), 0.0, 4.0)
    sinks = torch.linspace(-3, 12, shape[-3], device=x.device)
    check_tensors(backend, {"input": x, "sinks": sinks}, {})


@every_backend_and_cut
def test_sinks_that_are_not_finite(backend, cut):
    x = inputs_of((4, 3, 40), F32, device_of(backend))
    sinks = torch.tensor([INF, float("nan"), -INF, 1.0], device=x.device)
    check_tensors(backend, {"input": x, "sinks": sinks}, {})


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rows_that_see_nothing_are_zero_beside_any_sink(backend):
    x, sinks = torch.randn(3, 4, 40), torch.tensor([INF, float("nan"), 1.0])
    mask = torch.rand(4, 40) < 0.5
    mask[1], mask[2, 0] = False, True
    skip_unsupported("softmax", backend, x, mask=mask, sinks=sinks)
    y = sk.softmax(x, mask=mask, sinks=sinks, backend=backend)
    assert not y[:, 1].any() and y[:2, [0, 2, 3]].isnan().all() and y[2].isfinite().all()


def test_the_definitions_result_has_no_gaps_beside_sinks():
    y = sk.softmax(torch.randn(2, 3, 5), sinks=torch.randn(2), backend="torch")
    assert y.is_contiguous()


@every_backend_and_cut
def test_rows_that_see_nothing_and_have_no_sink(backend, cut):
    x = inputs_of((2, 3, 40), F32, device_of(backend))
    mask = torch.ones(2, 3, 1, dtype=torch.bool, device=x.device)
    mask[0, 1], mask[1, 1] = False, False
    sinks = torch.tensor([-INF, 1.0], device=x.device)
    skip_unsupported("softmax", backend, x, mask=mask, sinks=sinks)

    def results(backend, *tensors):
        return run_with_gradients(
            lambda x, s: sk.softmax(x, mask=mask, sinks=s, backend=backend), tensors
        )

    actual, eager = results(backend, x, sinks), results("torch", x, sinks)
    assert not actual["output 0"][:, 1].any() and not actual["gradient 0"][:, 1].any()
    for name, truth in results("torch", x.double(), sinks.double()).items():
        assert_no_worse(actual[name], eager[name], truth, what=name)


# Dropout


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    "shape, dim, rich",
    [(FOUR, -1, False), (FOUR, -1, True), ((2, 70, 5, 27), 1, False), ((3, 9, 1), 1, False)],
    ids=str,
)
@every_backend
def test_dropout(backend, shape, dim, rich, dtype):
    check_dropout(backend, shape, dim, rich, dtype)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_dropout_of_long_rows(backend):
    check_dropout(backend, (2, 3, 20011), -1, True, F32)


def check_dropout(backend, shape, dim, rich, dtype):
    x = inputs_of(shape, dtype, device_of(backend))
    tensors, options = (x,), {"dim": dim, "scale": 1.5, "dropout_p": 0.3}
    if rich:
        sinks = torch.linspace(-1, 1, shape[-3], device=x.device).to(dtype)
        tensors = (x, added_mask((shape[-2], shape[-1]), dtype, x.device), sinks)

    def call(backend):
        def run(x, mask=None, sinks=None):
            return sk.softmax(x, mask=mask, sinks=sinks, **options, backend=backend)

        return with_seed(run)

    skip_unsupported("softmax", backend, x, **options)
    actual, eager = (run_with_gradients(call(b), tensors) for b in (backend, "torch"))
    truth = run_with_gradients(call("torch"), tuple(t.double() for t in tensors))
    for name, expected in truth.items():
        assert_no_worse(actual[name], eager[name], expected, what=name)


@every_backend
def test_dropout_is_of_the_result_and_only_in_training(backend):
    x = inputs_of((40, 50), F32, device_of(backend))
    skip_unsupported("softmax", backend, x, dropout_p=0.25, scale=2.0)
    plain = sk.softmax(x, scale=2.0, backend=backend)
    dropped = sk.softmax(x, scale=2.0, dropout_p=0.25, backend=backend)
    kept = dropped != 0
    assert 0.7 < kept.double().mean() < 0.8
    rounding = torch.finfo(F32).eps * 2  # the scale's, the quotient's and the product's
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75, rtol=rounding, atol=0)
    other = sk.softmax(x, scale=2.0, dropout_p=0.25, backend=backend)
    assert not torch.equal(other, dropped)
    off = sk.softmax(x, scale=2.0, dropout_p=0.25, training=False, backend=backend)
    assert torch.equal(off, plain)


# Dimensions that are not the last


# Blocks of 64 columns and segments of 256 rows, whole and not; Triton's tiles end in between.
@pytest.mark.parametrize(
    "shape, dim",
    [((3, 7, 64), 1), ((1, 300, 2, 37), 1), ((513, 130), 0), ((2, 3, 5, 3), -2), ((0, 4, 5), 1)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_backend
def test_columns(backend, dtype, shape, dim):
    if backend == "triton":  # its tiles of 64 columns have 32 rows, and its interpreter no haste
        shape = tuple(min(n, 100) for n in shape)
    x = inputs_of(shape, dtype, device_of(backend), 0.0, 5.0)
    check(backend, x, {"dim": dim, "scale": 0.7})
    sizes = [1 if n in (2, 130) else n for n in shape]
    tensors = {"input": x, "mask": added_mask(sizes, dtype, x.device)}
    check_tensors(backend, tensors, {"dim": dim})


@pytest.mark.parametrize("backend, N", [("triton", 40), ("cpu", 20), ("cpu", 600)])
def test_columns_that_are_not_finite_or_see_nothing(backend, N):
    x = inputs_of((2, N, 70), F32, device_of(backend))
    x[0, 0, 0], x[0, 0, 1], x[0, 1, 2] = float("nan"), INF, -INF
    x[0, :, 3] = x[1, N // 2 :, 5] = -INF
    check_tensors(backend, {"input": x}, {"dim": 1, "scale": 0.9})
    mask = torch.rand((2, N, 70), device=x.device) < 0.5
    mask[0, :, :4], mask[1, : N // 2] = False, False
    y = sk.softmax(x, 1, mask=mask, backend=backend)
    assert not y[0, :, :4].any()
    # Not the gradient: eager's is NaN where -inf is seen beside what is hidden.
    eager, truth = (eager_softmax(t, 1, mask=mask) for t in (x, x.double()))
    assert_no_worse(y, eager, truth)


@every_backend
def test_the_result_has_no_gaps(backend):
    x = inputs_of((5, 6, 24), F32, device_of(backend))
    skip_unsupported("softmax", backend, x, 1, scale=2.0)
    for given in (x, x.transpose(0, 1), x[:, ::2], x.permute(2, 0, 1)):
        for dim in (0, 1, 2):
            y = sk.softmax(given, dim, scale=2.0, backend=backend)
            assert y.is_contiguous() and y.shape == given.shape
            dense = sk.softmax(given.contiguous(), dim, scale=2.0, backend=backend)
            assert torch.equal(y, dense)


MASK = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.5
LAYOUTS = {  # sizes and strides of a mask expanded to (2, 3, 5, 8), columns along 1; bytes copied
    "over blocks": ((2, 3, 5, 8), (0, 40, 8, 1), 0),
    "over columns": ((2, 3, 5, 8), (3, 1, 0, 0), 0),
    "over rows": ((2, 3, 5, 8), (40, 0, 8, 1), 0),
    "in steps": ((2, 3, 5, 8), (500, 100, 8, 1), 0),
    "part of the columns": ((2, 3, 5, 8), (24, 8, 0, 1), 240),
    "columns apart": ((2, 3, 5, 8), (240, 80, 16, 2), 240),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_a_mask(layout):
    sizes, strides, copied = LAYOUTS[layout]
    mask = MASK.as_strided(sizes, strides)
    found = mask_columns(mask.flatten(2))
    m, n, i = (torch.arange(k) for k in (2, 3, 40))
    at = m[:, None, None] * found.stride_outer + n[:, None] * found.stride_middle
    at = at + i * found.stride_col
    memory = found.mask.as_strided((int(at.max()) + 1,), (1,))
    assert torch.equal(memory[at], mask.flatten(2)) and found.stride_col in (0, 1)
    storage = found.mask.untyped_storage()
    shared = storage.data_ptr() == mask.untyped_storage().data_ptr()
    assert copied == (0 if shared else storage.nbytes())


# All of it at once


@pytest.mark.parametrize("compiled", ["sinks", "columns"])
@every_backend
def test_compiled(backend, compiled):
    x = inputs_of(FOUR, F32, device_of(backend))
    tensors = {"input": x, "mask": added_mask((2, 1, 5, 34), F32, x.device)}
    if compiled == "sinks":
        tensors["sinks"] = torch.tensor([0.5, 2.0, -1.0], device=x.device)
    options = {"dim": 1} if compiled == "columns" else {}
    check_tensors(backend, tensors, options, compiled=True)


def test_compiled_dropout_replays_its_bits():
    x = inputs_of(FOUR, F32, "cpu")

    def ours(x):
        return sk.softmax(x, dropout_p=0.4, scale=2.0, backend="cpu")

    skip_unsupported("softmax", "cpu", x, dropout_p=0.4)
    y, dx = run_with_gradients(maybe_compiled(ours, True), (x,), (torch.ones_like(x),)).values()

    def by_hand(x):
        p = torch.softmax(x * 2.0, -1)
        g = (y != 0).to(p) / 0.6
        return 2 * p * (g - (g * p).sum(-1, keepdim=True))

    assert_no_worse(dx, by_hand(x), by_hand(x.double()))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dim", [-1, -2])
def test_every_instruction_set_and_number_of_threads(each_isa, dim, dtype):
    threads = torch.get_num_threads()
    x = inputs_of((3, 5, 130, 97), dtype, "cpu", 0.0, 5.0)
    tensors = [x, added_mask((5, 130, 97), dtype, "cpu")]
    if dim == -1:
        tensors.append(torch.linspace(-2, 2, 5).to(dtype))

    def call(backend):
        def run(x, mask, sinks=None):
            return sk.softmax(x, dim, mask=mask, sinks=sinks, dropout_p=0.2, backend=backend)

        return with_seed(run)

    eager = run_with_gradients(call("torch"), tuple(tensors))
    truth = run_with_gradients(call("torch"), tuple(t.double() for t in tensors))
    for isa in each_isa():
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_with_gradients(call("cpu"), tuple(tensors)))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            # torch adds up the mask's gradient
            others = [] if name == "gradient 1" else results[1:]
            assert all(torch.equal(other[name], expected) for other in others), (isa, name)
            assert_no_worse(expected, eager[name], truth[name], what=f"{isa} {name}")
