import pytest
import torch
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
    with_seed,
)
from residual_cases import mask_of

import slimkernels as sk
from slimkernels.ops._dropout import draw_seed
from slimkernels.ops.bias_dropout_add import bias_dropout_add_reference
from slimkernels.testing import assert_op_matches, run_with_gradients

NAME = "bias_dropout_add"
SHAPES = [(1, 1), (3, 7), (2, 5, 64), (37, 130), (5, 600), (9,), (0, 8), (8, 0)]
DROPOUTS = [0.0, 0.3]
GIVEN = ["both", "bias", "residual", "neither"]


def inputs_of(shape, dtype, device, given="both", bias_dtype=None):
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, device=device).to(dtype).unbind()
    bias = torch.randn(shape[-1], device=device).to(bias_dtype or dtype)
    bias = bias if given in ("both", "bias") else None
    return x, bias, residual if given in ("both", "residual") else None


def functions_of(backend, dropout_p, compiled=False):
    """The op, eager PyTorch in the inputs' dtype, and the definition, from the same seed."""

    def ours(x, bias, residual):
        return sk.bias_dropout_add(x, bias, residual, dropout_p, backend=backend)

    def eager(x, bias, residual):
        y = x if bias is None else x + bias
        if dropout_p:
            y = y * mask_of(x, draw_seed(x.device), dropout_p) * (1 / (1 - dropout_p))
        return (y if residual is None else residual + y).to(x.dtype)

    def reference(x, bias, residual):
        seed = draw_seed(x.device) if dropout_p else None
        return bias_dropout_add_reference(x, bias, residual, dropout_p, seed)

    return with_seed(maybe_compiled(ours, compiled)), with_seed(eager), with_seed(reference)


def skip(backend, inputs, dropout_p=0.0):
    skip_unsupported(NAME, backend, *inputs, dropout_p)


def check(backend, inputs, dropout_p=0.0, compiled=False):
    skip(backend, inputs, dropout_p)
    assert_op_matches(*functions_of(backend, dropout_p, compiled), inputs)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, shape, dtype, given, dropout_p):
    check(backend, inputs_of(shape, dtype, device_of(backend), given), dropout_p)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_compiled(backend, dtype, given, dropout_p):
    check(backend, inputs_of((2, 5, 40), dtype, device_of(backend), given), dropout_p, True)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_float32_bias_with_bfloat16_input(backend, dropout_p):
    inputs = inputs_of((9, 40), torch.bfloat16, device_of(backend), bias_dtype=torch.float32)
    check(backend, inputs, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for given in GIVEN:
            for dropout_p in DROPOUTS:
                check("cpu", inputs_of((19, 133), dtype, "cpu", given), dropout_p)


@pytest.mark.parametrize("dropout_p", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_mask_is_that_of_the_definition_and_backward_replays_it(backend, dropout_p):
    x, _, _ = inputs_of((11, 37), torch.float32, device_of(backend))
    skip(backend, (x, None, None), dropout_p)
    ours, _, _ = functions_of(backend, dropout_p)
    results = run_with_gradients(lambda x: ours(x, None, None), (torch.ones_like(x),))
    torch.manual_seed(7)
    keep = mask_of(x, draw_seed(x.device), dropout_p)
    assert torch.equal(results["output 0"] != 0, keep)
    assert torch.equal(results["gradient 0"] != 0, keep)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_residuals_gradient_is_dy_exactly(backend, dropout_p):
    inputs = inputs_of((4, 33), torch.bfloat16, device_of(backend))
    skip(backend, inputs, dropout_p)
    ours, _, _ = functions_of(backend, dropout_p)
    dy = torch.randn(4, 33).to(inputs[0])
    assert torch.equal(run_with_gradients(ours, inputs, (dy,))["gradient 2"], dy)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_outputs_and_gradients_share_no_memory(backend, compiled, dropout_p):
    for given in GIVEN:
        inputs = inputs_of((3, 16), torch.float32, device_of(backend), given)
        skip(backend, inputs, dropout_p)
        ours, _, _ = functions_of(backend, dropout_p, compiled)
        inputs = [None if t is None else t.clone().requires_grad_() for t in inputs]
        leaves = [t for t in inputs if t is not None]
        y = ours(*inputs)
        y.square().sum().backward()
        tensors = [y, *leaves, *(t.grad for t in leaves)]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors), given


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_tensors(backend, dropout_p):
    x, bias, residual = inputs_of((4, 6, 24), torch.float32, device_of(backend))
    skip(backend, (x, bias, residual), dropout_p)
    ours, _, _ = functions_of(backend, dropout_p)
    dy = torch.randn(24, 6, 4, device=x.device).permute(2, 1, 0)
    dense = run_with_gradients(ours, (x, bias, residual), (dy.contiguous(),))

    def strided(x, bias, residual):
        residual = residual.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        return ours(x.mT.contiguous().mT, torch.stack([bias, bias], 1)[:, 0], residual)

    for name, actual in run_with_gradients(strided, (x, bias, residual), (dy,)).items():
        assert torch.equal(actual, dense[name]), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_what_is_dropped_does_not_matter(backend):
    # Selected, not multiplied by zero: infinity and NaN go too.
    inputs = inputs_of((6, 20), torch.float32, device_of(backend))
    skip(backend, inputs, 0.5)
    torch.manual_seed(7)
    keep = mask_of(inputs[0], draw_seed(inputs[0].device), 0.5)
    ours, _, _ = functions_of(backend, 0.5)
    spoilt = torch.where(keep, inputs[0], float("nan"))
    assert torch.equal(ours(*inputs), ours(spoilt, *inputs[1:]))
    assert ours(torch.where(keep, float("nan"), inputs[0]), *inputs[1:])[keep].isnan().all()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_extreme_values(backend):
    inf = float("inf")
    values = [0.0, -0.0, 1e-40, 3e38, -3e38, inf, -inf, float("nan")]
    values = torch.tensor(values, device=device_of(backend))
    x, residual = (t.contiguous() for t in torch.broadcast_tensors(values[:, None], values))
    inputs = (x, torch.zeros_like(values), residual)
    skip(backend, inputs, 0.5)
    for dropout_p in (0.0, 0.5):
        ours, _, reference = functions_of(backend, dropout_p)
        torch.testing.assert_close(
            ours(*inputs), reference(*inputs), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend):
    inputs = inputs_of((70, 65), torch.float32, device_of(backend))
    skip(backend, inputs, 0.1)
    ours, _, _ = functions_of(backend, 0.1)
    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(each_isa, dtype):
    inputs = inputs_of((700, 75), dtype, "cpu")  # enough for three threads
    ours, _, _ = functions_of("cpu", 0.1)
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


def test_the_definition():
    x, bias, residual = inputs_of((2, 3, 50), torch.float64, "cpu")
    assert torch.equal(sk.bias_dropout_add(x, bias, residual), residual + (x + bias))
    torch.manual_seed(1)
    y = sk.bias_dropout_add(x, bias, residual, 0.25)
    torch.manual_seed(1)
    keep = mask_of(x, draw_seed(x.device), 0.25)
    assert 0.5 < keep.double().mean() < 1
    assert_rounding_alone(y, residual + torch.where(keep, (x + bias) / 0.75, 0.0), terms=3)


X, B = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "args, sentence",
    [
        (([1.0],), "input must be a tensor; got list"),
        ((X.int(),), "input must be float32, .* or float64; got torch.int32"),
        ((X[0, 0],), r"input must have at least one dimension; got shape \(\)"),
        ((X, B[:3]), r"bias must have shape \(8,\), the last .*\(4, 8\); got \(3,\)"),
        ((X, B.half()), "bias must be torch.float32 like input, or float32; got"),
        ((X, B, 1.0), "residual must be a tensor; got float"),
        ((X, B, X[:3]), r"residual must have input's shape \(4, 8\); got \(3, 8\)"),
        ((X, B, X.half()), "residual must have input's dtype torch.float32; got torch.float16"),
        ((X, B, X.to("meta")), "residual must have input's device cpu; got meta"),
        ((X, B, X, 1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
        ((X, B, X, "a"), "dropout_p must be a number; got 'a'"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, args, sentence):
    with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
        sk.bias_dropout_add(*args, backend=backend)


def test_small_inputs_without_dropout_are_left_to_eager(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.bias_dropout_add")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 100)
    x, bias, residual = inputs_of((9, 11), torch.bfloat16, "cpu")
    assert torch.equal(sk.bias_dropout_add(x, bias, residual), residual + (x + bias))
    with pytest.raises(sk.BackendError, match="faster below 100 elements, and the output has 99"):
        sk.bias_dropout_add(x, bias, residual, backend="cpu")
    text = sk.explain(sk.bias_dropout_add, x, bias, residual, 0.1)
    assert text.startswith("bias_dropout_add runs on cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("wide", ["input", "residual"])
def test_autocast_adds_two_dtypes_as_torch_does(wide, backend):
    x, bias, residual = inputs_of((5, 12), torch.bfloat16, "cpu")
    x, residual = (x.float(), residual) if wide == "input" else (x, residual.float())
    skip_unsupported(NAME, backend, x.float(), bias.float(), residual.float())
    ours, eager, reference = functions_of(backend, 0.0)

    def autocast(x, bias, residual):
        with torch.autocast(x.device.type, torch.bfloat16):
            y = ours(x, bias, residual)
        assert y.dtype == torch.float32
        return y

    def promoted(x, bias, residual):
        return residual + (x.float() + bias)

    inputs = (x, bias.to(x.dtype), residual)
    assert_op_matches(autocast, promoted, promoted, inputs)
    with pytest.raises(ValueError, match="residual must have input's dtype"):
        ours(*inputs)
