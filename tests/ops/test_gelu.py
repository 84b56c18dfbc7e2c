import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, KERNEL_BACKENDS, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.ops.gelu import gelu_backward, gelu_forward, gelu_reference
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (37, 130), (70, 33), (5, 600), (0, 8), (8, 0)]
APPROXIMATIONS = ["none", "tanh"]


def inputs_of(shape, dtype, spread, device, has_bias=True, bias_dtype=None):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).mul(spread).to(dtype)
    bias = torch.randn(shape[-1], device=device).to(bias_dtype or dtype)
    return x, bias if has_bias else None


def check(backend, inputs, approximate, compiled=False):
    skip_unsupported("gelu", backend, inputs[0], bias=inputs[1], approximate=approximate)

    def ours(x, bias):
        return sk.gelu(x, bias=bias, approximate=approximate, backend=backend)

    def eager(x, bias):
        z = x if bias is None else x + bias
        return F.gelu(z, approximate=approximate).to(x.dtype)

    def reference(x, bias):
        return gelu_reference(x, bias, approximate)

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("spread", [1.0, 6.0])
@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, shape, dtype, approximate, spread, compiled):
    check(backend, inputs_of(shape, dtype, spread, device_of(backend)), approximate, compiled)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 70), (9, 1000), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_without_bias(backend, dtype, shape, approximate):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device_of(backend)).mul(3).to(dtype)
    check(backend, (x, None), approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_float32_bias_with_bfloat16_input(backend, approximate):
    inputs = inputs_of((9, 40), torch.bfloat16, 1.0, device_of(backend), True, torch.float32)
    check(backend, inputs, approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_negative_tail_keeps_its_relative_accuracy(backend, approximate):
    device = device_of(backend)
    for low in range(-9, 0):
        z = torch.linspace(low, low + 1, 301, device=device)
        bias = torch.zeros_like(z)
        skip_unsupported("gelu", backend, z, bias=bias, approximate=approximate)
        y = sk.gelu(z, bias=bias, approximate=approximate, backend=backend)
        truth = gelu_reference(z.double(), None, approximate)
        # The exponent, about z^2 / 2 or z^3 / 14, is rounded in float32: no kernel can do better.
        exponent = truth.div(z).log().abs() + 8
        error = (y - truth).abs() / truth.abs().clamp(min=1e-300) / exponent
        assert error[z < 0].max() < torch.finfo(torch.float32).eps * 2, (low, error.max())


def test_exact_tail_on_the_cpu_is_right_to_a_few_units_in_the_last_place(each_isa):
    """What csrc/cpu/vec.h promises of normal(): the rounding of z^2 is put back."""
    z = torch.linspace(-12, 0, 36001)[:-1]
    truth = gelu_reference(z.double(), None, "none")
    for isa in each_isa():
        y = sk.gelu(z, bias=torch.zeros_like(z), backend="cpu")
        error = ((y - truth) / truth).abs().max().item()
        assert error < 4 * torch.finfo(torch.float32).eps, isa


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype, approximate):
    for _ in each_isa():
        for has_bias in (True, False):
            x, bias = inputs_of((19, 133), dtype, 3.0, "cpu", has_bias)
            dy = torch.randn_like(x)
            ours = [gelu_forward(x, bias, approximate, "cpu")]
            ours += gelu_backward(dy, x, bias, approximate, "cpu")[: 1 + has_bias]

            def reference(x, bias=None):
                return gelu_reference(x, bias, approximate)

            def eager(x, bias=None):
                return F.gelu(x if bias is None else x + bias, approximate=approximate)

            given = (x, bias)[: 1 + has_bias]
            truth = run_with_gradients(reference, tuple(t.double() for t in given), (dy.double(),))
            baseline = run_with_gradients(eager, given, (dy,))
            for actual, name in zip(ours, truth, strict=True):
                assert_no_worse(actual, baseline[name], truth[name], what=name)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_extreme_values(backend, approximate):
    inf = float("inf")
    x = [0.0, -0.0, 1e-40, 1e4, -1e4, 40.0, -40.0, 1e18, -1e18, inf, -inf, float("nan")]
    x = torch.tensor(x, device=device_of(backend))
    bias = torch.zeros_like(x)
    skip_unsupported("gelu", backend, x, bias=bias, approximate=approximate)

    def call(function):
        return run_with_gradients(function, (x,), (torch.ones_like(x),)).values()

    y, dx = call(lambda x: sk.gelu(x, bias=bias, approximate=approximate, backend=backend))
    truth, dtruth = call(lambda x: gelu_reference(x, None, approximate))
    torch.testing.assert_close(y, truth, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(dx, dtruth, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_input_and_gradient(backend, approximate):
    x, bias = inputs_of((6, 4, 24), torch.float32, 1.0, device_of(backend))
    bias = torch.stack([bias, bias], -1)[:, 0]  # every other element
    skip_unsupported("gelu", backend, x, bias=bias, approximate=approximate)

    def gelu(x, bias):
        return sk.gelu(x, bias=bias, approximate=approximate, backend=backend)

    dense = run_with_gradients(gelu, (x, bias.contiguous()))
    strided = run_with_gradients(lambda x: gelu(x.transpose(0, 1), bias).transpose(0, 1), (x,))
    for name, expected in strided.items():
        assert torch.equal(dense[name], expected), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend):
    inputs = inputs_of((70, 65), torch.float32, 1.0, device_of(backend))
    skip_unsupported("gelu", backend, inputs[0], bias=inputs[1])

    def ours(x, bias):
        return sk.gelu(x, bias=bias, backend=backend)

    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(each_isa, dtype):
    inputs = inputs_of((301, 257), dtype, 1.0, "cpu")
    threads = torch.get_num_threads()
    for isa in each_isa():
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(
                run_with_gradients(lambda x, b: sk.gelu(x, bias=b, backend="cpu"), inputs)
            )
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            assert torch.equal(results[1][name], expected), (isa, name)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_the_definition_is_torchs(approximate):
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    theirs = F.gelu(x + 0.25, approximate=approximate)
    for backend in (None, "torch"):
        bias = torch.full((101,), 0.25, dtype=torch.float64)
        ours = sk.gelu(x, bias=bias, approximate=approximate, backend=backend)
        assert (ours - theirs).abs().max() < 1e-14
    ours = gelu_reference(x, torch.full_like(x, 0.25), approximate)
    assert (ours - theirs).abs().max() < 1e-14


X, B = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(input=[1.0]), "input must be a tensor; got list"),
        (dict(input=X.int()), "input must be float32, float16, bfloat16 or float64; got torch.int"),
        (dict(input=X, approximate="erf"), "approximate must be 'none' or 'tanh'; got 'erf'"),
        (
            dict(input=X, bias=B[:3]),
            r"bias must have shape \(8,\), the last .*\(4, 8\); got \(3,\)",
        ),
        (dict(input=X[0, 0], bias=B[:1]), r"bias must have shape \(\), the last .*; got \(1,\)"),
        (dict(input=X, bias=B.half()), "bias must be torch.float32 like input, or float32; got"),
        (dict(input=X, bias=B.to("meta")), "bias must be on cpu like input; got meta"),
        (dict(input=X, bias=1.0), "bias must be a tensor; got float"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, arguments, sentence):
    with pytest.raises(ValueError, match="^gelu: " + sentence):
        sk.gelu(**arguments, backend=backend)
