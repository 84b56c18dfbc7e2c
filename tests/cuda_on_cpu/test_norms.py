"""The CUDA kernels of layer_norm, rms_norm and both of a sum on the CPU: see conftest.py."""

import contextlib
import os

import pytest
import torch
import torch.nn.functional as F
from residual_cases import functions_of, inputs_of

import slimkernels as sk
from slimkernels.ops.layer_norm import layer_norm_reference
from slimkernels.ops.rms_norm import rms_norm_reference
from slimkernels.testing import assert_op_matches, run_with_gradients

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
# 8, 16 and 32 lanes a row, a block, and clusters of two and four; aligned to 16 bytes and not; more
# rows than the 4 * 128 threads that device.cpp's one multiprocessor takes at a time.
SHAPES = [(1, 1), (70, 33), (35, 136), (19, 384), (9, 515), (5, 2048), (3, 4101), (2, 16392)]


def plain(op):
    """The op, eager PyTorch, and the definition, of (x, weight[, bias])."""
    ours, eager, reference = {
        "layer_norm": (sk.layer_norm, F.layer_norm, layer_norm_reference),
        "rms_norm": (sk.rms_norm, F.rms_norm, rms_norm_reference),
    }[op]
    return (
        lambda x, *parameters: ours(x, x.shape[-1:], *parameters, EPS, backend="cuda"),
        lambda x, *parameters: eager(x, x.shape[-1:], *parameters, EPS),
        lambda x, *parameters: reference(x, *parameters, EPS),
    )


def check(functions, inputs):
    assert_op_matches(*functions, inputs)
    return run_with_gradients(functions[0], inputs)


@contextlib.contextmanager
def without_clusters():
    os.environ["CUDA_ON_CPU_CAPABILITY"] = "80"
    try:
        yield
    finally:
        del os.environ["CUDA_ON_CPU_CAPABILITY"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_matches_reference(op, shape, dtype):
    x, _, *parameters = inputs_of(f"add_{op}", shape, dtype, "cpu")
    return check(plain(op), (x, *parameters))


OPTIONS = {
    "sum": {},
    "dropout": {"dropout_p": 0.6},
    "all": {"dropout_p": 0.1, "row_scale": True, "zero_centered": True},
}


@pytest.mark.parametrize("wide", [(), ("residual",), ("parameter",)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(9, 40), (6, 515), (3, 9000)], ids=str)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_of_a_sum(op, shape, options, wide):
    dtypes = {f"{name}_dtype": torch.float32 for name in wide}
    inputs = inputs_of(op, shape, torch.bfloat16, "cpu", **dtypes)
    options = dict(OPTIONS[options])
    if "row_scale" in options:
        options["row_scale"] = torch.randn(shape[0])
    return check(functions_of(op, "cuda", **options), inputs)


@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_float16(op):
    return check(functions_of(op, "cuda"), inputs_of(op, (9, 136), torch.float16, "cpu"))


@pytest.mark.parametrize("N", [9000, 16403])
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_rows_in_pieces_where_there_are_no_clusters(op, N):
    with without_clusters():
        inputs = inputs_of(op, (6, N), torch.float32, "cpu")
        return check(functions_of(op, "cuda", dropout_p=0.1), inputs)


@pytest.mark.parametrize("has_clusters", [True, False])
def test_far_from_zero(has_clusters):
    with contextlib.nullcontext() if has_clusters else without_clusters():
        x, _, *parameters = inputs_of("add_layer_norm", (3, 16400), torch.float32, "cpu")
        return check(plain("layer_norm"), (x + 1000, *parameters))


@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_optional_parameters(given):
    x, _, weight, bias = inputs_of("add_layer_norm", (9, 40), torch.float32, "cpu")
    ours, eager, reference = plain("layer_norm")

    def with_given(function):
        if given == "bias":
            return lambda x, bias: function(x, None, bias)
        return lambda x, *weight: function(x, *weight, *[None] * (2 - len(weight)))

    inputs = {"weight": (x, weight), "bias": (x, bias), "neither": (x,)}[given]
    return check([with_given(f) for f in (ours, eager, reference)], inputs)


def test_unaligned_tensors_take_the_narrow_path():
    x, _, *parameters = inputs_of("add_layer_norm", (5, 64), torch.float32, "cpu")
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(5, 64)
    ours, _, _ = plain("layer_norm")
    assert shifted.data_ptr() % 16 != 0
    assert (ours(shifted, *parameters) - ours(x, *parameters)).abs().max() < 1e-6


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_no_rows(op):
    x, _, *parameters = inputs_of(f"add_{op}", (0, 24), torch.float32, "cpu")
    results = run_with_gradients(plain(op)[0], (x, *parameters))
    assert results["output 0"].shape == x.shape
    assert all((results[f"gradient {i}"] == 0).all() for i in range(len(parameters) + 1))


def test_not_finite_values_stay_in_their_row():
    x, _, *parameters = inputs_of("add_layer_norm", (20, 40), torch.float32, "cpu")
    x[3, 3], x[7, 39] = float("nan"), float("inf")
    results = run_with_gradients(plain("layer_norm")[0], (x, *parameters))
    for name in ("output 0", "gradient 0"):
        is_spoilt = results[name].isnan().all(-1)
        assert is_spoilt.nonzero().flatten().tolist() == [3, 7]
        assert results[name][~is_spoilt].isfinite().all()


def test_the_output_is_the_norm_of_the_sum():
    for shape in SHAPES[:-1]:
        x, residual, *parameters = inputs_of("add_layer_norm", shape, torch.bfloat16, "cpu")
        options = {"dropout_p": 0.5, "backend": "cuda"}
        y, total = sk.add_layer_norm(x, residual, shape[-1], *parameters, EPS, **options)
        assert torch.equal(y, plain("layer_norm")[0](total, *parameters)), shape
