import functools

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
    with_seed,
)
from residual_cases import mask_of

import slimkernels as sk
from slimkernels.ops._dropout import draw_seed
from slimkernels.ops.add_layer_norm import add_layer_norm_forward, add_layer_norm_reference
from slimkernels.ops.layer_norm import layer_norm_forward
from slimkernels.testing import assert_op_matches, run_with_gradients

NAME = "add_layer_norm"
SHAPES = [(1, 1), (5, 1), (3, 7), (2, 5, 64), (4, 3, 769), (70, 33), (0, 8)]
DROPOUTS = [0.0, 0.6]


def inputs_of(shape, dtype, device, mean=0.0, parameters="both", parameter_dtypes=None):
    """x, residual, whose sum has the mean, weight and bias."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, device=device).unbind()
    weight, bias = torch.randn(2, shape[-1], device=device).unbind()
    weight, bias = (
        p.to(t) for p, t in zip((weight, bias), parameter_dtypes or (dtype, dtype), strict=True)
    )
    return (
        x.to(dtype),
        (residual + mean).to(dtype),
        weight if parameters in ("both", "weight") else None,
        bias if parameters in ("both", "bias") else None,
    )


def functions_of(backend, dropout_p, compiled=False):
    """The op, eager PyTorch in the inputs' dtype, and the definition, from the same seed."""

    def ours(x, residual, weight, bias):
        return sk.add_layer_norm(
            x, residual, x.shape[-1:], weight, bias, dropout_p=dropout_p, backend=backend
        )

    def eager(x, residual, weight, bias):
        if dropout_p:
            keep = mask_of(x, draw_seed(x.device), dropout_p)
            x = x * keep * (1 / (1 - dropout_p))
        total = residual + x
        # A GPU's layer_norm takes one dtype for everything.
        given = [t for t in (total, weight, bias) if t is not None]
        wide = functools.reduce(torch.promote_types, (t.dtype for t in given))
        weight, bias = (None if p is None else p.to(wide) for p in (weight, bias))
        return F.layer_norm(total.to(wide), x.shape[-1:], weight, bias).to(total.dtype), total

    def reference(x, residual, weight, bias):
        seed = draw_seed(x.device) if dropout_p else None
        return add_layer_norm_reference(
            x, residual, weight, bias, 1e-5, dropout_p, None, False, seed
        )

    return with_seed(maybe_compiled(ours, compiled)), with_seed(eager), with_seed(reference)


def skip(backend, inputs, dropout_p=0.0):
    x, residual, weight, bias = inputs
    skip_unsupported(NAME, backend, x, residual, x.shape[-1:], weight, bias, dropout_p=dropout_p)


def check(backend, inputs, dropout_p=0.0, compiled=False):
    skip(backend, inputs, dropout_p)
    assert_op_matches(*functions_of(backend, dropout_p, compiled), inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, shape, dtype, dropout_p, compiled):
    for mean in (0.0,) if compiled else (0.0, 100.0):
        check(backend, inputs_of(shape, dtype, device_of(backend), mean), dropout_p, compiled)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("parameters", ["weight", "bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_optional_parameters(backend, dtype, parameters, dropout_p):
    check(backend, inputs_of((5, 37), dtype, device_of(backend), 0.0, parameters), dropout_p)


@pytest.mark.parametrize("weight", DTYPES[:2], ids=str)
@pytest.mark.parametrize("bias", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_float32_parameters_with_bfloat16_input(backend, weight, bias):
    device, dtypes = device_of(backend), (weight, bias)
    check(backend, inputs_of((9, 40), torch.bfloat16, device, parameter_dtypes=dtypes), 0.1)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for shape in SHAPES:
            for dropout_p in DROPOUTS:
                check("cpu", inputs_of(shape, dtype, "cpu"), dropout_p)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("used", [0, 1], ids=["output only", "sum only"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_one_output_used(backend, used, dropout_p, compiled):
    *inputs, weight, bias = inputs_of((6, 45), torch.float32, device_of(backend))
    skip(backend, (*inputs, weight, bias), dropout_p)

    def one(function):
        return lambda x, residual: function(x, residual, weight, bias)[used]

    functions = functions_of(backend, dropout_p, compiled)
    assert_op_matches(*(one(function) for function in functions), tuple(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_gradient_of_the_sum_reaches_both_inputs_exactly(backend, dtype):
    inputs = inputs_of((4, 33), dtype, device_of(backend))
    skip(backend, inputs, 0.5)
    ours, _, _ = functions_of(backend, 0.5)
    dys = torch.zeros_like(inputs[0]), torch.randn(4, 33).to(inputs[0])
    results = run_with_gradients(ours, inputs, dys)
    torch.manual_seed(7)
    keep = mask_of(inputs[0], draw_seed(inputs[0].device), 0.5)
    assert torch.equal(results["gradient 1"], dys[1])
    assert torch.equal(results["gradient 0"], dys[1] * keep * 2)
    assert (results["gradient 2"] == 0).all() and (results["gradient 3"] == 0).all()


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_output_is_layer_norm_of_the_sum(each_isa, backend, dtype, dropout_p):
    for shape in SHAPES:
        inputs = inputs_of(shape, dtype, device_of(backend), 3.0)
        skip(backend, inputs, dropout_p)
        seed = draw_seed(inputs[0].device) if dropout_p else None
        for isa in each_isa() if backend == "cpu" else [None]:
            y, total, *moments = add_layer_norm_forward(
                *inputs, 1e-5, dropout_p, None, False, seed, backend
            )
            expected = layer_norm_forward(total, *inputs[2:], 1e-5, False, backend)
            for a, b in zip((y, *moments), expected, strict=True):
                assert torch.equal(a, b), (isa, shape)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_gradients_share_no_memory(backend, compiled, dropout_p):
    # Without dropout both inputs get the same numbers.
    inputs = inputs_of((3, 16), torch.float32, device_of(backend))
    skip(backend, inputs, dropout_p)
    ours, _, _ = functions_of(backend, dropout_p, compiled)
    leaves = [t.requires_grad_() for t in inputs]
    y, total = ours(*leaves)
    (y.square().sum() + total.sum()).backward()
    addresses = {t.grad.untyped_storage().data_ptr() for t in leaves}
    assert len(addresses) == len(leaves)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_tensors(backend, dropout_p):
    *inputs, weight, bias = inputs_of((6, 4, 24), torch.float32, device_of(backend))
    inputs = [*(t.transpose(0, 1) for t in inputs), weight[::2].repeat(2), bias[:1].expand(24)]
    skip(backend, inputs, dropout_p)
    scattered = [*(t.mT.contiguous().mT for t in inputs[:2]), torch.stack([inputs[2]] * 2, 1)[:, 0]]
    scattered.append(inputs[3])
    ours, _, _ = functions_of(backend, dropout_p)
    dy = torch.randn(4, 6, 1, device=weight.device).expand(4, 6, 24)
    dsum = torch.randn(24, 6, 4, device=weight.device).permute(2, 1, 0)
    dense = [t.contiguous().requires_grad_() for t in inputs]
    strided = [t.detach().requires_grad_() for t in scattered]
    expected = torch.autograd.grad(ours(*dense), dense, (dy.contiguous(), dsum.contiguous()))
    actual = torch.autograd.grad(ours(*strided), strided, (dy, dsum))
    for a, b in zip((*ours(*strided), *actual), (*ours(*dense), *expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_row(backend, dropout_p):
    inputs = inputs_of((5, 20), torch.float32, device_of(backend))
    residual = inputs[1]
    residual[1, 3], residual[2, 19] = float("nan"), float("inf")
    skip(backend, inputs, dropout_p)
    ours, _, _ = functions_of(backend, dropout_p)
    results = run_with_gradients(ours, inputs)
    y, total, dx = (results[name] for name in ("output 0", "output 1", "gradient 1"))
    assert y[1:3].isnan().all() and dx[1:3].isnan().all()
    assert (~total.isfinite()).sum() == 2
    for t in (y, dx):
        assert t[[0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_equal_huge_values(backend):
    # mean * rstd, which padding at the end of a row would hold, is infinite; eager gives NaN.
    x, residual, weight, bias = inputs_of((3, 20), torch.float32, device_of(backend))
    inputs = (torch.zeros_like(x), torch.full_like(residual, 2.0**123), weight, bias)
    skip(backend, inputs)
    ours, _, _ = functions_of(backend, 0.0)
    results = run_with_gradients(ours, inputs)
    assert all(t.isfinite().all() for t in results.values())
    assert torch.equal(results["output 0"], bias.expand(3, 20))
    assert (results["gradient 2"] == 0).all()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_what_is_dropped_does_not_matter(backend):
    # Selected, not multiplied by zero: infinity and NaN go too.
    inputs = inputs_of((6, 20), torch.float32, device_of(backend))
    skip(backend, inputs, 0.5)
    x = inputs[0]
    torch.manual_seed(7)
    keep = mask_of(x, draw_seed(x.device), 0.5)
    ours, _, _ = functions_of(backend, 0.5)
    spoilt = torch.where(keep, x, float("nan"))
    for a, b in zip(ours(x, *inputs[1:]), ours(spoilt, *inputs[1:]), strict=True):
        assert torch.equal(a, b)


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


def test_the_definition_is_torchs():
    x, residual, weight, bias = inputs_of((3, 4, 5), torch.float64, "cpu")
    weight, bias = weight.expand(4, 5), bias.expand(4, 5)
    y, total = sk.add_layer_norm(x, residual, (4, 5), weight, bias, eps=1e-3)
    assert torch.equal(total, residual + x)
    theirs = F.layer_norm(residual + x, (4, 5), weight, bias, eps=1e-3)
    assert_rounding_alone(y, theirs, terms=20)


def test_the_definition_of_dropout_is_the_mask_of_each_row():
    x, residual, weight, bias = inputs_of((2, 3, 50), torch.float64, "cpu")
    torch.manual_seed(1)
    _, total = sk.add_layer_norm(x, residual, 50, weight, bias, dropout_p=0.25)
    torch.manual_seed(1)
    keep = mask_of(x, draw_seed(x.device), 0.25)
    assert 0.5 < keep.double().mean() < 1
    assert_rounding_alone(total, residual + torch.where(keep, x / 0.75, 0.0), terms=2)


X, W = torch.randn(4, 8), torch.ones(8)


@pytest.mark.parametrize(
    "args, options, sentence",
    [
        (([1.0], X, 8), {}, "input must be a tensor; got list"),
        ((X.int(), X, 8), {}, "input must be float32, .* or float64; got torch.int32"),
        ((X, [1.0], 8), {}, "residual must be a tensor; got list"),
        ((X, X[:3], 8), {}, r"residual must have input's shape \(4, 8\); got \(3, 8\)"),
        ((X, X.half(), 8), {}, "residual must be torch.float32 like input, or float32; got"),
        ((X, X.to("meta"), 8), {}, "residual must be on cpu like input; got meta"),
        ((X, X, 4), {}, r"normalized_shape must be the last .* \(4, 8\); got \(4,\)"),
        ((X, X, 8, W[:3]), {}, r"weight must have shape \(8,\), the normalized .*; got \(3,\)"),
        ((X, X, 8, W, W.half()), {}, "bias must be torch.float32 like input, or float32; got"),
        ((X[:, :0], X[:, :0], 0), {}, r"a row of input \(4, 0\) has no elements"),
        ((X, X, 8), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        ((X, X, 8), {"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\); got -0.1"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, args, options, sentence):
    with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
        sk.add_layer_norm(*args, **options, backend=backend)


def test_small_float32_without_dropout_is_left_to_aten(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.add_layer_norm")
    monkeypatch.setattr(cpu, "MIN_FLOAT32", 100)
    x, residual = torch.randn(2, 9, 11)
    y, total = sk.add_layer_norm(x, residual, 11)
    assert torch.equal(total, residual + x) and torch.equal(y, F.layer_norm(total, (11,)))
    with pytest.raises(sk.BackendError, match="faster below 100 elements .* input has 99"):
        sk.add_layer_norm(x, residual, 11, backend="cpu")
    text = sk.explain(sk.add_layer_norm, x, residual, 11, dropout_p=0.1)
    assert text.startswith("add_layer_norm runs on cpu")
