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
from slimkernels.ops.rms_norm import rms_norm_reference
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 3, 769), (130, 33), (0, 8)]


def inputs_of(shape, dtype, device, parameter_dtype=None):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).mul(3).to(dtype)
    return x, torch.randn(shape[-1], device=device).to(parameter_dtype or dtype)


def check(backend, inputs, compiled=False, zero_centered=False, eps=1e-5):
    x, *weight = inputs
    skip_unsupported("rms_norm", backend, x, x.shape[-1:], *weight)

    def ours(x, weight=None):
        return sk.rms_norm(
            x, x.shape[-1:], weight, eps, zero_centered=zero_centered, backend=backend
        )

    def eager(x, weight=None):
        if zero_centered:
            weight = weight.float() + 1
        if weight is None or weight.dtype == x.dtype:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        # Eager takes one dtype for x and its weight, except by way of a warning.
        return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)

    def reference(x, weight=None):
        return rms_norm_reference(x, weight, eps, zero_centered)

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, shape, dtype, compiled):
    check(backend, inputs_of(shape, dtype, device_of(backend)), compiled)


@pytest.mark.parametrize("parameter_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_variants_of_the_weight(backend, dtype, parameter_dtype):
    inputs = inputs_of((9, 37), dtype, device_of(backend), parameter_dtype)
    check(backend, inputs)
    check(backend, inputs, zero_centered=True)
    check(backend, inputs[:1])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for shape in SHAPES:
            check("cpu", inputs_of(shape, dtype, "cpu"), zero_centered=len(shape) == 3)


# Past the register file of a Triton program, and past what the CPU sums by rows in backward.
@pytest.mark.parametrize("shape", [(5, 8197), (2, 17000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_long_rows(backend, shape, dtype):
    inputs = inputs_of(shape, dtype, device_of(backend))
    check(backend, inputs, zero_centered=dtype == torch.bfloat16)
    check(backend, inputs[:1])


@pytest.mark.parametrize("size", [1e-18, 1e-4, 1e15])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_small_and_large_values(backend, size):
    x, weight = inputs_of((6, 45), torch.float32, device_of(backend))
    check(backend, (x * size, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_the_default_of_eps_is_torchs(backend, dtype):
    x = torch.full((2, 8), 1e-4, dtype=dtype, device=device_of(backend))
    skip_unsupported("rms_norm", backend, x, 8)
    ours, theirs = sk.rms_norm(x, 8, backend=backend), F.rms_norm(x, (8,))
    # Eight squares, a root and a product; another eps would change the third digit.
    assert (ours / theirs - 1).abs().max() <= 4 * torch.finfo(dtype).eps
    assert (ours / x).max() < 1e4


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_input_and_gradient(backend):
    x, weight = inputs_of((6, 4, 24), torch.float32, device_of(backend))
    skip_unsupported("rms_norm", backend, x, 24, weight)

    def strided(x):
        return sk.rms_norm(x.transpose(0, 1), 24, weight, backend=backend).transpose(0, 1)

    dense = run_with_gradients(lambda x: sk.rms_norm(x, 24, weight, backend=backend), (x,))
    strided = run_with_gradients(strided, (x,))
    for name, expected in dense.items():
        assert torch.equal(strided[name], expected), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_row(backend):
    x, weight = inputs_of((4, 20), torch.float32, device_of(backend))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    skip_unsupported("rms_norm", backend, x, 20, weight)
    results = run_with_gradients(lambda x: sk.rms_norm(x, 20, weight, backend=backend), (x,))
    for t in results.values():
        assert t[1].isnan().all() and t[2].isnan().any() and t[[0, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(700, 75), (3, 20000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(each_isa, dtype, shape):
    inputs = inputs_of(shape, dtype, "cpu")

    def ours(x, weight):
        return sk.rms_norm(x, x.shape[-1:], weight, backend="cpu")

    threads = torch.get_num_threads()
    for isa in each_isa():
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_with_gradients(ours, inputs))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            for other in results[1:]:
                assert torch.equal(other[name], expected), (isa, name)


@pytest.mark.parametrize("shape", [(70, 65), (3, 8200)], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend, shape):
    inputs = inputs_of(shape, torch.float32, device_of(backend))
    skip_unsupported("rms_norm", backend, inputs[0], shape[-1], inputs[1])

    def ours(x, weight):
        return sk.rms_norm(x, shape[-1], weight, backend=backend)

    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=str)
def test_the_torch_backend_is_the_definition(dtype, parameter_dtype, zero_centered):
    parameter_dtype = None if dtype == torch.float64 else parameter_dtype
    inputs = inputs_of((9, 40), dtype, "cpu", parameter_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = sk.rms_norm(
            inputs[0], 40, inputs[1], 1e-5, zero_centered=zero_centered, backend="torch"
        )
    wide = (t.double() for t in inputs)
    eager = rms_norm_reference(*inputs, 1e-5, zero_centered)
    assert_no_worse(actual, eager, rms_norm_reference(*wide, 1e-5, zero_centered))


def test_the_definition_is_torchs():
    x, weight = inputs_of((3, 4, 5), torch.float64, "cpu")
    ours = sk.rms_norm(x, (4, 5), weight.expand(4, 5))
    assert_rounding_alone(ours, F.rms_norm(x, (4, 5), weight.expand(4, 5)), terms=20)


def test_few_elements_are_left_to_torch(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.rms_norm")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 100)
    x, weight = torch.randn(9, 11), torch.randn(11)
    assert torch.equal(sk.rms_norm(x, 11, weight), F.rms_norm(x, (11,), weight))
    with pytest.raises(sk.BackendError, match="faster below 100 elements and input has 99"):
        sk.rms_norm(x, 11, backend="cpu")
    for args, options in (
        ((torch.randn(10, 11), 11, weight), {}),
        ((x, 11, weight), {"zero_centered": True}),
        ((x.bfloat16(), 11, weight), {}),
    ):
        assert sk.explain(sk.rms_norm, *args, **options).startswith("rms_norm runs on cpu")


X, W = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "args, options, sentence",
    [
        (([1.0], 8), {}, "input must be a tensor; got list"),
        ((X, 4), {}, r"normalized_shape must be the last .* \(4, 8\); got \(4,\)"),
        ((X, 8, W[:3]), {}, r"weight must have shape \(8,\), the normalized .*; got \(3,\)"),
        ((X, 8, W.half()), {}, "weight must be torch.float32 like input, or float32; got"),
        ((X, 8, W, "a"), {}, "eps must be a number; got 'a'"),
        ((X, 8, W), {"zero_centered": W}, "zero_centered must be True or False; got"),
        ((torch.empty(4, 0), 0), {}, r"a row of input \(4, 0\) has no elements"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, args, options, sentence):
    with pytest.raises(ValueError, match="^rms_norm: " + sentence):
        sk.rms_norm(*args, **options, backend=backend)
