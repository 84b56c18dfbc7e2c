"""What every op y = f(gate) * up is tested for: a test class that swiglu's and geglu's inherit."""

import pytest
import torch
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
)

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops._gated import gated_reference
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (37, 65), (70, 33), (5, 600), (9,), (0, 8), (8, 0)]
INF = float("inf")


def halves(packed):
    return packed.chunk(2, -1) if packed.shape[-1] else (packed, packed)


def inputs_of(shape, dtype, device, is_packed):
    """One packed tensor with rows of twice shape's, or gate and up."""
    torch.manual_seed(0)
    x = torch.randn(*shape[:-1], 2 * shape[-1], device=device).mul(3).to(dtype)
    return (x,) if is_packed else tuple(t.contiguous() for t in halves(x))


def input_and_gate(inputs):
    return inputs[-1], inputs[0] if len(inputs) == 2 else None


class GatedTests:
    """A subclass has `op`, its name, eager(gate, up, **variant), and perhaps other variants."""

    op: str

    @pytest.fixture(params=[{}], ids=str)
    def variant(self, request):
        return request.param

    def call(self, variant, backend):
        def ours(*inputs):
            x, gate = input_and_gate(inputs)
            return getattr(sk, self.op)(x, gate=gate, backend=backend, **variant)

        return ours

    def skip(self, backend, inputs, variant):
        x, gate = input_and_gate(inputs)
        skip_unsupported(self.op, backend, x, gate=gate, **variant)

    def functions(self, variant):
        """Eager PyTorch and the definition."""
        curve = OPS[self.op].arguments(torch.zeros(2), **variant)[2]

        def eager(*inputs):
            return self.eager(*(inputs if len(inputs) == 2 else halves(*inputs)), **variant)

        return eager, lambda *inputs: gated_reference(*input_and_gate(inputs), curve)

    def check(self, backend, inputs, variant, compiled=False):
        self.skip(backend, inputs, variant)
        ours = maybe_compiled(self.call(variant, backend), compiled)
        assert_op_matches(ours, *self.functions(variant), inputs)

    @pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "split"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_matches_reference(self, backend, shape, dtype, is_packed, variant):
        self.check(backend, inputs_of(shape, dtype, device_of(backend), is_packed), variant)

    @pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "split"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(2, 5, 64), (0, 8)], ids=str)
    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_compiled(self, backend, shape, dtype, is_packed, variant):
        self.check(backend, inputs_of(shape, dtype, device_of(backend), is_packed), variant, True)

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_every_instruction_set(self, each_isa, dtype, variant):
        for _ in each_isa():
            for is_packed in (True, False):
                self.check("cpu", inputs_of((19, 133), dtype, "cpu", is_packed), variant)

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_the_gate_is_the_first_half(self, backend, variant):
        gate, up = inputs_of((5, 24), torch.float32, device_of(backend), False)
        self.skip(backend, (gate, up), variant)
        ours = self.call(variant, backend)
        assert torch.equal(ours(torch.cat([gate, up], -1)), ours(gate, up))
        assert not torch.equal(ours(torch.cat([up, gate], -1)), ours(gate, up))

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_views_are_read_through_their_strides(self, backend, variant):
        (packed,) = inputs_of((6, 4, 24), torch.float32, device_of(backend), True)
        self.skip(backend, (packed,), variant)
        ours = self.call(variant, backend)
        dense = run_with_gradients(ours, halves(packed))
        dy = torch.randn(4, 24, 6, device=packed.device).permute(2, 0, 1)
        views = {
            "halves": lambda x: ours(*halves(x)),
            "transposed": lambda x: ours(x.transpose(0, 1)).transpose(0, 1),
            "every other": lambda x: ours(torch.stack([x, x], -1)[..., 0]),
            "part of rows": lambda x: ours(torch.cat([x, x], -1)[..., :48]),
            "one half copied": lambda x: ours(halves(x)[0], halves(x)[1].contiguous()),
            "column": lambda x: ours(x.mT.contiguous().mT),
        }
        for name, view in views.items():
            results = run_with_gradients(view, (packed,))
            assert torch.equal(results["output 0"], dense["output 0"]), name
            expected = torch.cat([dense["gradient 0"], dense["gradient 1"]], -1)
            assert torch.equal(results["gradient 0"], expected), name
        strided = run_with_gradients(ours, (packed,), (dy,))
        dense = run_with_gradients(ours, (packed,), (dy.contiguous(),))
        assert torch.equal(strided["gradient 0"], dense["gradient 0"])

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_extreme_values(self, backend, variant):
        values = [0.0, -0.0, 1e-40, 1e4, -1e4, 40.0, -40.0, 1e18, -1e18, INF, -INF, float("nan")]
        values = torch.tensor(values, device=device_of(backend))
        gate, up = (t.contiguous() for t in torch.broadcast_tensors(values[:, None], values))
        self.skip(backend, (gate, up), variant)
        # Eager's, since the definition's own autograd multiplies an infinite up by gate = 0.
        eager, _ = self.functions(variant)
        one = torch.ones_like(up)
        truth = run_with_gradients(eager, (gate.double(), up.double()), (one.double(),))
        actual = run_with_gradients(self.call(variant, backend), (gate, up), (one,))
        for name, expected in truth.items():
            expected = expected.float()
            rtol = 16 * torch.finfo(torch.float32).eps  # element by element
            torch.testing.assert_close(actual[name], expected, rtol=rtol, atol=0, equal_nan=True)

    @pytest.mark.parametrize("backend", KERNEL_BACKENDS)
    def test_same_bits_every_time(self, backend, variant):
        inputs = inputs_of((70, 65), torch.float32, device_of(backend), True)
        self.skip(backend, inputs, variant)
        ours = self.call(variant, backend)
        first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
        for name, expected in first.items():
            assert torch.equal(second[name], expected), name

    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_same_bits_for_any_number_of_threads(self, each_isa, dtype, variant):
        inputs = inputs_of((301, 257), dtype, "cpu", True)
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

    def test_the_definition_is_torchs(self, variant):
        (packed,) = inputs_of((7, 50), torch.float64, "cpu", True)
        theirs = self.eager(*packed.chunk(2, -1), **variant)
        _, reference = self.functions(variant)
        for ours in (self.call(variant, None), self.call(variant, "torch"), reference):
            assert_rounding_alone(ours(packed), theirs, terms=4)
            assert_rounding_alone(ours(*packed.chunk(2, -1)), theirs, terms=4)

    @pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
    def test_bad_input_is_one_sentence(self, backend):
        x = torch.randn(4, 8)
        dtypes = "float32, float16, bfloat16 or float64"
        cases = [
            (dict(input=[1.0]), "input must be a tensor; got list"),
            (dict(input=x.int()), f"input must be {dtypes}; got torch.int"),
            (dict(input=x[0, 0]), r"input must have at least one dimension; got shape \(\)"),
            (dict(input=x[:, 1:]), r"input must have an even last .*; got shape \(4, 7\)"),
            (dict(input=x, gate=1.0), "gate must be a tensor; got float"),
            (dict(input=x, gate=x[:3]), r"gate must have input's shape \(4, 8\); got \(3, 8\)"),
            (dict(input=x, gate=x.half()), "gate must have input's dtype torch.float32; got"),
            (dict(input=x, gate=x.to("meta")), "gate must have input's device cpu; got meta"),
        ]
        for arguments, sentence in cases:
            with pytest.raises(ValueError, match=f"^{self.op}: {sentence}"):
                getattr(sk, self.op)(**arguments, backend=backend)

    @pytest.mark.parametrize("backend", ["cpu", "torch"])
    def test_autocast_multiplies_two_dtypes_as_torch_does(self, variant, backend):
        gate, up = inputs_of((5, 12), torch.bfloat16, "cpu", False)
        for inputs in ((gate.float(), up), (gate, up.float())):
            skip_unsupported(self.op, backend, inputs[1].float(), gate=inputs[0].float())
            with torch.autocast("cpu", torch.bfloat16):
                y = self.call(variant, backend)(*inputs)
            assert y.dtype == torch.float32
            eager, truth = (
                self.eager(*(t.to(dtype) for t in inputs), **variant)
                for dtype in (torch.float32, torch.float64)
            )
            assert_no_worse(y, eager, truth)
