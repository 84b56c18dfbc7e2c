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
from slimkernels.ops.layer_norm import layer_norm_reference
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (4, 3, 769), (130, 33), (0, 8)]


def inputs_of(shape, dtype, mean, device, parameters="both", parameter_dtype=None):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).add(mean).to(dtype)
    weight, bias = torch.randn(2, shape[-1], device=device).to(parameter_dtype or dtype).unbind()
    return {
        "both": (x, weight, bias),
        "weight": (x, weight, None),
        "bias": (x, None, bias),
        "none": (x, None, None),
    }[parameters]


def check(backend, inputs, compiled=False, zero_centered=False):
    skip_unsupported("layer_norm", backend, inputs[0], inputs[0].shape[-1:], *inputs[1:])

    def ours(x, weight, bias):
        return sk.layer_norm(
            x, x.shape[-1:], weight, bias, zero_centered=zero_centered, backend=backend
        )

    def eager(x, weight, bias):
        # Eager takes one dtype for x and its parameters, except on the CPU.
        if zero_centered and weight is not None:
            full = weight.float() + 1
            bias = None if bias is None else bias.float()
            return F.layer_norm(x.float(), x.shape[-1:], full, bias).to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def reference(x, weight, bias):
        return layer_norm_reference(x, weight, bias, 1e-5, zero_centered)

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, shape, dtype, compiled):
    for mean in (0.0,) if compiled else (0.0, 100.0):
        check(backend, inputs_of(shape, dtype, mean, device_of(backend)), compiled)


@pytest.mark.parametrize("parameters", ["weight", "bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_optional_parameters(backend, dtype, parameters):
    check(backend, inputs_of((5, 37), dtype, 0.0, device_of(backend), parameters))


@pytest.mark.parametrize("parameters", ["both", "weight", "bias"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_weight_that_is_centred_at_zero(backend, dtype, parameters):
    inputs = inputs_of((9, 40), dtype, 0.0, device_of(backend), parameters)
    check(backend, inputs, zero_centered=True)


# Past what a Triton program holds, and past what the CPU sums by rows in backward; the mean of the
# last is far from zero, and differs between the parts of a row.
@pytest.mark.parametrize("shape, mean", [((5, 8197), 0.0), ((2, 17000), 0.0), ((2, 17000), 100.0)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_long_rows(backend, dtype, shape, mean):
    x, weight, bias = inputs_of(shape, dtype, mean, device_of(backend))
    if mean:
        x = (x.float() * torch.linspace(0.5, 1.5, shape[-1], device=x.device)).to(dtype)
    check(backend, (x, weight, bias), zero_centered=dtype == torch.bfloat16)
    check(backend, (x, None, None if mean else bias))


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_float32_parameters_with_bfloat16_input(backend):
    device = device_of(backend)
    check(backend, inputs_of((9, 40), torch.bfloat16, 0.0, device, "both", torch.float32))


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype, mean):
    for _ in each_isa():
        for shape in SHAPES:
            check("cpu", inputs_of(shape, dtype, mean, "cpu"))


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_input_and_gradient(backend):
    x, weight, bias = inputs_of((6, 4, 24), torch.float32, 0.0, device_of(backend))
    skip_unsupported("layer_norm", backend, x, (24,), weight, bias)

    def ours(x):
        y = sk.layer_norm(x.transpose(0, 1), (24,), weight, bias, backend=backend)
        return y.transpose(0, 1)

    dense = run_with_gradients(
        lambda x: sk.layer_norm(x, (24,), weight, bias, backend=backend), (x,)
    )
    strided = run_with_gradients(ours, (x,))
    for name, expected in dense.items():
        assert torch.equal(strided[name], expected), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_row(backend):
    x, weight, bias = inputs_of((4, 20), torch.float32, 0.0, device_of(backend))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    skip_unsupported("layer_norm", backend, x, (20,), weight, bias)
    y = sk.layer_norm(x, (20,), weight, bias, backend=backend)
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("shape", [(70, 65), (3, 8200)], ids=str)
def test_same_bits_every_time(backend, shape):
    inputs = inputs_of(shape, torch.float32, 0.0, device_of(backend))
    skip_unsupported("layer_norm", backend, inputs[0], shape[1:], *inputs[1:])

    def ours(x, weight, bias):
        return sk.layer_norm(x, shape[1:], weight, bias, backend=backend)

    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", [(700, 75), (3, 20000)], ids=str)  # enough for three threads
def test_same_bits_for_any_number_of_threads(each_isa, dtype, shape):
    inputs = inputs_of(shape, dtype, 0.0, "cpu")

    def ours(x, weight, bias):
        return sk.layer_norm(x, shape[1:], weight, bias, backend="cpu")

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


def test_small_float32_is_left_to_aten(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.layer_norm")
    monkeypatch.setattr(cpu, "MIN_FLOAT32", 100)
    x = torch.randn(9, 11)
    assert torch.equal(sk.layer_norm(x, 11), F.layer_norm(x, (11,)))
    with pytest.raises(sk.BackendError, match="faster below 100 elements and input has 99"):
        sk.layer_norm(x, 11, backend="cpu")
    larger = torch.randn(10, 11)
    for run in (x.bfloat16(), larger):
        assert sk.explain(sk.layer_norm, run, 11).startswith("layer_norm runs on cpu")

    monkeypatch.setattr(cpu, "MIN_FLOAT32_TRAINED", 111)
    weight = torch.ones(11, requires_grad=True)
    with pytest.raises(sk.BackendError, match="with gradients is faster below 111 elements"):
        sk.layer_norm(larger, 11, weight, backend="cpu")
    with torch.no_grad():
        assert sk.explain(sk.layer_norm, larger, 11, weight).startswith("layer_norm runs on cpu")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=str)
def test_the_torch_backend_is_the_definition(dtype, parameter_dtype):
    inputs = inputs_of((9, 40), dtype, 100.0, "cpu", "both", parameter_dtype)
    if dtype == torch.float64 and parameter_dtype:
        inputs = inputs[0], *(p.double() for p in inputs[1:])
    with torch.autocast("cpu", torch.bfloat16):
        actual = sk.layer_norm(inputs[0], (40,), *inputs[1:], backend="torch")
    wide = (t.double() for t in inputs)
    eager = layer_norm_reference(*inputs, 1e-5)
    assert_no_worse(actual, eager, layer_norm_reference(*wide, 1e-5))


def test_the_definition_is_torchs():
    x, weight, bias = inputs_of((3, 4, 5), torch.float64, 0.0, "cpu")
    ours = sk.layer_norm(x, (4, 5), weight.expand(4, 5), bias.expand(4, 5), eps=1e-3)
    theirs = F.layer_norm(x, (4, 5), weight.expand(4, 5), bias.expand(4, 5), eps=1e-3)
    assert_rounding_alone(ours, theirs, terms=20)


X, W = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "args, sentence",
    [
        (([1.0],), "input must be a tensor; got list"),
        ((X.int(), 8), "input must be float32, float16, bfloat16 or float64; got torch.int32"),
        ((X, 4), r"normalized_shape must be the last dimensions of input \(4, 8\); got \(4,\)"),
        ((X, 8, W[:3]), r"weight must have shape \(8,\), the normalized .*; got \(3,\)"),
        ((X, 8, W, W.half()), "bias must be torch.float32 like input, or float32; got"),
        ((X, 8, W.to("meta")), "weight must be on cpu like input; got meta"),
        ((torch.empty(4, 0), 0), r"a row of input \(4, 0\) has no elements"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, args, sentence):
    args = args if len(args) > 1 else (*args, 1)
    with pytest.raises(ValueError, match="^layer_norm: " + sentence):
        sk.layer_norm(*args, backend=backend)


def test_long_rows_that_programs_share(monkeypatch):
    long_rows = pytest.importorskip("slimkernels.backends.triton._long_rows")
    # A row has five parts: two shares of the rows.
    monkeypatch.setattr(long_rows, "row_programs", lambda x, M: 10)
    check("triton", inputs_of((5, 8197), torch.float32, 0.0, device_of("triton")))
