import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, KERNEL_BACKENDS, assert_rounding_alone, device_of
from residual_cases import check, functions_of, inputs_of

import slimkernels as sk
from slimkernels.ops._dropout import draw_seed
from slimkernels.ops.add_rms_norm import add_rms_norm_forward
from slimkernels.ops.rms_norm import rms_norm_forward
from slimkernels.testing import assert_op_matches, run_with_gradients

NAME = "add_rms_norm"
# One column is a difference of almost equal terms in backward: of 1x1 the error is luck.
SHAPES = [(9, 1), (3, 7), (2, 5, 64), (3, 769), (40, 33), (0, 8)]
DROPOUTS = [0.0, 0.6]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, dtype, dropout_p, compiled):
    for shape in SHAPES[:3] if compiled else SHAPES:
        inputs = inputs_of(NAME, shape, dtype, device_of(backend))
        check(NAME, backend, inputs, compiled, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_without_weight(backend, dropout_p):
    inputs = inputs_of(NAME, (5, 37), torch.float32, device_of(backend))
    check(NAME, backend, inputs[:2], dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for shape in SHAPES:
            for dropout_p in DROPOUTS:
                check(NAME, "cpu", inputs_of(NAME, shape, dtype, "cpu"), dropout_p=dropout_p)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("used", [0, 1], ids=["output only", "sum only"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_one_output_used(backend, used, dropout_p, compiled):
    x, residual, weight = inputs_of(NAME, (6, 45), torch.float32, device_of(backend))
    check(NAME, backend, (x, residual, weight), dropout_p=dropout_p)  # skips

    inputs = (x, residual) if used else (x, residual, weight)  # no weight is in the sum

    def one(function):
        return lambda *given: function(*given, *(x, residual, weight)[len(given) :])[used]

    functions = functions_of(NAME, backend, dropout_p=dropout_p, compiled=compiled)
    assert_op_matches(*(one(function) for function in functions), inputs)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_output_is_rms_norm_of_the_sum(each_isa, backend, dtype, dropout_p):
    for shape in SHAPES:
        inputs = inputs_of(NAME, shape, dtype, device_of(backend))
        check(NAME, backend, inputs)  # skips
        seed = draw_seed(inputs[0].device) if dropout_p else None
        for isa in each_isa() if backend == "cpu" else [None]:
            y, total, rstd = add_rms_norm_forward(
                *inputs, 1e-5, dropout_p, None, False, seed, backend
            )
            expected = rms_norm_forward(total, *inputs[2:], 1e-5, False, backend)
            for a, b in zip((y, rstd), expected, strict=True):
                assert torch.equal(a, b), (isa, shape)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_row(backend):
    inputs = inputs_of(NAME, (5, 20), torch.float32, device_of(backend))
    check(NAME, backend, inputs)  # skips
    inputs[1][1, 3], inputs[1][2, 19] = float("nan"), float("inf")
    results = run_with_gradients(functions_of(NAME, backend)[0], inputs)
    y, total, dx = (results[name] for name in ("output 0", "output 1", "gradient 1"))
    assert y[1].isnan().all() and dx[1].isnan().all() and y[2].isnan().any()
    assert (~total.isfinite()).sum() == 2
    assert y[[0, 3, 4]].isfinite().all() and dx[[0, 3, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(each_isa, dtype):
    inputs = inputs_of(NAME, (700, 75), dtype, "cpu")  # enough for three threads
    ours, _, _ = functions_of(NAME, "cpu", dropout_p=0.1)
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
    x, residual, weight = inputs_of(NAME, (3, 4, 5), torch.float64, "cpu")
    weight = weight.expand(4, 5)
    y, total = sk.add_rms_norm(x, residual, (4, 5), weight)
    assert torch.equal(total, residual + x)
    assert_rounding_alone(y, F.rms_norm(residual + x, (4, 5), weight), terms=20)


def test_few_elements_without_dropout_are_left_to_torch(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.add_rms_norm")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 100)
    x, residual = torch.randn(2, 9, 11)
    y, total = sk.add_rms_norm(x, residual, 11)
    assert torch.equal(total, residual + x) and torch.equal(y, F.rms_norm(total, (11,)))
    with pytest.raises(sk.BackendError, match="faster below 100 elements .* input has 99"):
        sk.add_rms_norm(x, residual, 11, backend="cpu")
    text = sk.explain(sk.add_rms_norm, x, residual, 11, dropout_p=0.1)
    assert text.startswith("add_rms_norm runs on cpu")
