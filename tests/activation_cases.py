"""What every op y = f(x + bias) is tested for: a test class that the test file of each inherits."""

import pytest
import torch
from op_cases import DTYPES, KERNEL_BACKENDS, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops._activation import (
    activation_backward,
    activation_forward,
    activation_reference,
)
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (37, 130), (70, 33), (5, 600), (0, 8), (8, 0)]
INF = float("inf")


def inputs_of(shape, dtype, spread, device, has_bias=True, bias_dtype=None):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).mul(spread).to(dtype)
    bias = torch.randn(shape[-1], device=device).to(bias_dtype or dtype)
    return x, bias if has_bias else None


class ActivationTests:
    """A subclass has `op`, its name, eager(z, **variant), and perhaps variants of its own."""

    op: str

    @pytest.fixture(params=[{}], ids=str)
    def variant(self, request):
        return request.param

    def call(self, variant, backend):
        return lambda x, bias: getattr(sk, self.op)(x, bias=bias, backend=backend, **variant)

    def skip(self, backend, inputs, variant):
        skip_unsupported(self.op, backend, inputs[0], bias=inputs[1], **variant)

    def functions(self, variant):
        """Eager PyTorch and the definition."""
        curve = OPS[self.op].arguments(torch.zeros(1), **variant)[2]

        def eager(x, bias=None):
            return self.eager(x if bias is None else x + bias, **variant).to(x.dtype)

        return eager, lambda x, bias=None: activation_reference(x, bias, curve)

    def check(self, backend, inputs, variant, compiled=False):
        self.skip(backend, inputs, variant)
        ours = maybe_compiled(self.call(variant, backend), compiled)
        assert_op_matches(ours, *self.functions(variant), inputs)

    @pytest.mark.parametrize("spread", [1.0, 6.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_matches_reference(self, backend, shape, dtype, spread, variant):
        self.check(backend, inputs_of(shape, dtype, spread, device_of(backend)), variant)

    @pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(2, 5, 64), (0, 8)], ids=str)
    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_compiled(self, backend, shape, dtype, has_bias, variant):
        inputs = inputs_of(shape, dtype, 3.0, device_of(backend), has_bias)
        self.check(backend, inputs, variant, compiled=True)

    @pytest.mark.parametrize("shape", [(), (7,), (3, 5, 70), (9, 1000), (0, 4)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_without_bias(self, backend, dtype, shape, variant):
        torch.manual_seed(0)
        x = torch.randn(shape, device=device_of(backend)).mul(3).to(dtype)
        self.check(backend, (x, None), variant)

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_float32_bias_with_bfloat16_input(self, backend, variant):
        device = device_of(backend)
        inputs = inputs_of((9, 40), torch.bfloat16, 1.0, device, True, torch.float32)
        self.check(backend, inputs, variant)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_every_instruction_set(self, each_isa, dtype, variant):
        eager, reference = self.functions(variant)
        curve = OPS[self.op].arguments(torch.zeros(1), **variant)[2]
        for _ in each_isa():
            for has_bias in (True, False):
                x, bias = inputs_of((19, 133), dtype, 3.0, "cpu", has_bias)
                dy = torch.randn_like(x)
                ours = [activation_forward(x, bias, curve, "cpu")]
                ours += activation_backward(dy, x, bias, curve, "cpu")[: 1 + has_bias]
                given = (x, bias)[: 1 + has_bias]
                wide = tuple(t.double() for t in given)
                truth = run_with_gradients(reference, wide, (dy.double(),))
                baseline = run_with_gradients(eager, given, (dy,))
                for actual, name in zip(ours, truth, strict=True):
                    assert_no_worse(actual, baseline[name], truth[name], what=name)

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_extreme_values(self, backend, variant):
        x = [0.0, -0.0, 1e-40, 1e4, -1e4, 40.0, -40.0, 1e18, -1e18, INF, -INF, float("nan")]
        x = torch.tensor(x, device=device_of(backend))
        bias = torch.zeros_like(x)
        self.skip(backend, (x, bias), variant)
        ours, (_, reference) = self.call(variant, backend), self.functions(variant)

        def results(function):
            return run_with_gradients(function, (x,), (torch.ones_like(x),)).values()

        for actual, truth in zip(results(lambda x: ours(x, bias)), results(reference), strict=True):
            rtol = 8 * torch.finfo(torch.float32).eps  # element by element
            torch.testing.assert_close(actual, truth, rtol=rtol, atol=0, equal_nan=True)

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_non_contiguous_input_and_gradient(self, backend, variant):
        x, bias = inputs_of((6, 4, 24), torch.float32, 1.0, device_of(backend))
        bias = torch.stack([bias, bias], -1)[:, 0]  # every other element
        self.skip(backend, (x, bias), variant)
        ours = self.call(variant, backend)
        dense = run_with_gradients(ours, (x, bias.contiguous()))
        strided = run_with_gradients(lambda x: ours(x.transpose(0, 1), bias).transpose(0, 1), (x,))
        for name, expected in strided.items():
            assert torch.equal(dense[name], expected), name

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_same_bits_every_time(self, backend, variant):
        inputs = inputs_of((70, 65), torch.float32, 1.0, device_of(backend))
        self.skip(backend, inputs, variant)
        ours = self.call(variant, backend)
        first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
        for name, expected in first.items():
            assert torch.equal(second[name], expected), name

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_same_bits_for_any_number_of_threads(self, each_isa, dtype, variant):
        inputs = inputs_of((301, 257), dtype, 1.0, "cpu")
        self.skip("cpu", inputs, variant)
        threads = torch.get_num_threads()
        for isa in each_isa():
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(run_with_gradients(self.call(variant, "cpu"), inputs))
            torch.set_num_threads(threads)
            for name, expected in results[0].items():
                assert torch.equal(results[1][name], expected), (isa, name)

    def test_what_is_left_to_eager_is_eagers(self, variant):
        x, bias = inputs_of((5, 7), torch.bfloat16, 1.0, "cpu")
        ours, (eager, _) = self.call(variant, "torch"), self.functions(variant)
        for given in ((x, None), (x, bias.float())):
            assert torch.equal(ours(*given), eager(*given))
        # Eager would round the sum once more.
        assert torch.equal(ours(x, bias), eager(x.float(), bias.float()).to(x.dtype))

    def test_the_definition_is_torchs(self, variant):
        x = torch.linspace(-5, 5, 101, dtype=torch.float64)
        theirs, bias = self.eager(x + 0.25, **variant), torch.full_like(x, 0.25)
        _, reference = self.functions(variant)
        for ours in (self.call(variant, None), self.call(variant, "torch"), reference):
            assert (ours(x, bias) - theirs).abs().max() < 2e-14

    @pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
    def test_bad_input_is_one_sentence(self, backend):
        x, bias = torch.randn(4, 8), torch.ones(8)
        dtypes = "float32, float16, bfloat16 or float64"
        cases = [
            (dict(input=[1.0]), "input must be a tensor; got list"),
            (dict(input=x.int()), f"input must be {dtypes}; got torch.int"),
            (dict(input=x, bias=bias[:3]), r"bias must have shape \(8,\), the last .*; got \(3,\)"),
            (
                dict(input=x[0, 0], bias=bias[:1]),
                r"input must have a dimension for bias to lie along; got shape \(\)",
            ),
            (dict(input=x, bias=bias.half()), "bias must be torch.float32 like input, or float32;"),
            (dict(input=x, bias=bias.to("meta")), "bias must be on cpu like input; got meta"),
            (dict(input=x, bias=1.0), "bias must be a tensor; got float"),
        ]
        for arguments, sentence in cases:
            with pytest.raises(ValueError, match=f"^{self.op}: {sentence}"):
                getattr(sk, self.op)(**arguments, backend=backend)
