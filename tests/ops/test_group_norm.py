import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, KERNEL_BACKENDS, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.ops.group_norm import group_norm_reference
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

# (N, C, *), groups
CASES = [
    ((12, 6), 2),
    ((2, 6, 5), 3),
    ((2, 6, 5), 6),
    ((2, 6, 5), 1),
    ((2, 70, 3, 7), 1),
    ((3, 8, 37), 2),
    ((0, 4, 3), 2),
]


def inputs_of(shape, dtype, device, mean=0.0, parameters="both", parameter_dtype=None):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).add(mean).to(dtype)
    weight, bias = torch.randn(2, shape[1], device=device).to(parameter_dtype or dtype).unbind()
    return {
        "both": (x, weight, bias),
        "weight": (x, weight, None),
        "bias": (x, None, bias),
        "none": (x, None, None),
    }[parameters]


def check(backend, inputs, groups, compiled=False):
    skip_unsupported("group_norm", backend, inputs[0], groups, *inputs[1:])

    def ours(x, weight, bias):
        return sk.group_norm(x, groups, weight, bias, backend=backend)

    def eager(x, weight, bias):
        # Eager takes one dtype for x and its parameters, except on the CPU, and in backward fails
        # without a weight.
        weight = torch.ones_like(bias) if weight is None and bias is not None else weight
        return F.group_norm(x, groups, weight, bias)

    def reference(x, weight, bias):
        return group_norm_reference(x, groups, weight, bias, 1e-5)

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, dtype, compiled):
    for mean in (0.0,) if compiled else (0.0, 100.0):
        for shape, groups in CASES[1:4] if compiled else CASES:
            check(backend, inputs_of(shape, dtype, device_of(backend), mean), groups, compiled)


# More channels in a group than Triton adds up at once, and rows past what a program of it holds.
@pytest.mark.parametrize("shape, groups", [((2, 140), 2), ((1, 4, 4500), 2), ((2, 6, 3000), 2)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_large_groups(backend, dtype, shape, groups):
    check(backend, inputs_of(shape, dtype, device_of(backend)), groups)


@pytest.mark.parametrize("parameters", ["weight", "bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_optional_parameters(backend, dtype, parameters):
    inputs = inputs_of((2, 6, 35), dtype, device_of(backend), parameters=parameters)
    check(backend, inputs, 3)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_float32_parameters_with_bfloat16_input(backend):
    inputs = inputs_of((2, 6, 5), torch.bfloat16, device_of(backend), 0.0, "both", torch.float32)
    check(backend, inputs, 3)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for shape, groups in CASES:
            check("cpu", inputs_of(shape, dtype, "cpu", 3.0), groups)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_input_and_gradient(backend):
    x, weight, bias = inputs_of((2, 6, 4, 5), torch.float32, device_of(backend))
    skip_unsupported("group_norm", backend, x, 3, weight, bias)

    def ours(x):
        return sk.group_norm(x, 3, weight, bias, backend=backend)

    dense = run_with_gradients(ours, (x,))
    layouts = [lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)]
    if backend != "cpu":
        layouts.append(lambda x: x.contiguous(memory_format=torch.channels_last))
    for layout in layouts:
        results = run_with_gradients(lambda x, layout=layout: ours(layout(x)), (x,))
        for name, expected in results.items():
            assert torch.equal(expected, dense[name]), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_group(backend):
    x, weight, bias = inputs_of((2, 6, 5), torch.float32, device_of(backend))
    x[0, 3, 2], x[1, 0, 1] = float("nan"), float("inf")
    skip_unsupported("group_norm", backend, x, 3, weight, bias)
    results = run_with_gradients(lambda x: sk.group_norm(x, 3, weight, bias, backend=backend), (x,))
    for t in results.values():
        assert t[0, 2:4].isnan().all() and t[1, :2].isnan().all()
        assert t[0, [0, 1, 4, 5]].isfinite().all() and t[1, 2:].isfinite().all()


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_channels_without_elements(backend):
    inputs = inputs_of((2, 4, 0), torch.float32, device_of(backend))
    skip_unsupported("group_norm", backend, inputs[0], 2, *inputs[1:])
    results = run_with_gradients(lambda x, w, b: sk.group_norm(x, 2, w, b, backend=backend), inputs)
    assert results["output 0"].shape == results["gradient 0"].shape == (2, 4, 0)
    assert (results["gradient 1"] == 0).all() and (results["gradient 2"] == 0).all()


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_a_group_of_one_element_is_its_bias(backend):
    x, weight, bias = inputs_of((1, 4), torch.float32, device_of(backend))
    skip_unsupported("group_norm", backend, x, 4, weight, bias)
    assert torch.equal(sk.group_norm(x, 4, weight, bias, backend=backend), bias[None])


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend):
    inputs = inputs_of((3, 8, 65), torch.float32, device_of(backend))
    skip_unsupported("group_norm", backend, inputs[0], 4, *inputs[1:])

    def ours(x, weight, bias):
        return sk.group_norm(x, 4, weight, bias, backend=backend)

    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(each_isa, dtype):
    inputs = inputs_of((3, 16, 1100), dtype, "cpu")  # enough for three threads

    def ours(x, weight, bias):
        return sk.group_norm(x, 4, weight, bias, backend="cpu")

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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("parameter_dtype", [torch.float32, None], ids=str)
def test_the_torch_backend_is_the_definition(dtype, parameter_dtype):
    parameter_dtype = None if dtype == torch.float64 else parameter_dtype
    inputs = inputs_of((3, 8, 5), dtype, "cpu", 100.0, "both", parameter_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = sk.group_norm(inputs[0], 2, *inputs[1:], backend="torch")
    wide = (t.double() for t in inputs)
    x, *parameters = inputs
    eager = group_norm_reference(x, 2, *parameters, 1e-5)
    x, *parameters = wide
    assert_no_worse(actual, eager, group_norm_reference(x, 2, *parameters, 1e-5))


def test_the_definition_is_torchs():
    x, weight, bias = inputs_of((3, 6, 4, 5), torch.float64, "cpu")
    theirs = F.group_norm(x, 3, weight, bias, eps=1e-3)
    assert (sk.group_norm(x, 3, weight, bias, eps=1e-3) - theirs).abs().max() < 1e-13


def test_what_aten_does_faster_is_left_to_it(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.group_norm")
    monkeypatch.setattr(cpu, "MIN_FLOAT32", 100)
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 50)
    x = torch.randn(2, 6, 2, 4)
    assert torch.equal(sk.group_norm(x, 3), F.group_norm(x, 3))
    with pytest.raises(sk.BackendError, match="faster below 100 .* torch.float32 .* has 96"):
        sk.group_norm(x, 3, backend="cpu")
    with pytest.raises(sk.BackendError, match="channels are last in memory"):
        last = x.bfloat16().contiguous(memory_format=torch.channels_last)
        sk.group_norm(last, 3, backend="cpu")
    assert sk.explain(sk.group_norm, x.bfloat16(), 3).startswith("group_norm runs on cpu")


X, W = torch.randn(2, 6, 5), torch.ones(6)


@pytest.mark.parametrize(
    "args, sentence",
    [
        (([1.0], 1), "input must be a tensor; got list"),
        ((X.int(), 1), "input must be float32, float16, bfloat16 or float64; got torch.int32"),
        ((X[0, 0], 1), r"input must have shape \(N, C, \*\); got \(5,\)"),
        ((X, 2.0), "num_groups must be an integer; got 2.0"),
        ((X, 4), r"num_groups must divide the 6 channels of input \(2, 6, 5\); got 4"),
        ((X, 0), r"num_groups must divide the 6 channels of input \(2, 6, 5\); got 0"),
        ((X, 2, W[:3]), r"weight must have shape \(6,\), the channels of input .*; got \(3,\)"),
        ((X, 2, W, W.half()), "bias must be torch.float32 like input, or float32; got"),
        ((X, 2, W.to("meta")), "weight must be on cpu like input; got meta"),
        ((X, 2, W, W, "a"), "eps must be a number; got 'a'"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, args, sentence):
    with pytest.raises(ValueError, match="^group_norm: " + sentence):
        sk.group_norm(*args, backend=backend)
