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
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

EPS = 1e-5
F32, BF16 = torch.float32, torch.bfloat16
# 8, 16 and 32 lanes a row, a block, clusters of two and four; aligned to 16 bytes and not; more
# rows than a multiprocessor, which device.cpp has one of, takes at a time.
ROWS = [
    *(((1, 1), F32), ((70, 33), BF16), ((35, 136), F32), ((19, 384), BF16), ((9, 515), F32)),
    *(((5, 2048), BF16), ((3, 4101), F32), ((2, 16392), BF16), ((9, 136), torch.float16)),
]


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


@contextlib.contextmanager
def without_clusters():
    os.environ["CUDA_ON_CPU_CAPABILITY"] = "80"
    try:
        yield
    finally:
        del os.environ["CUDA_ON_CPU_CAPABILITY"]


@pytest.mark.parametrize("shape, dtype", ROWS, ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_matches_reference(op, shape, dtype):
    x, _, *parameters = inputs_of(f"add_{op}", shape, dtype, "cpu")
    return assert_op_matches(*plain(op), (x, *parameters))


SUMS = [
    ((9, 40), {}, ()),
    ((9, 40), {"dropout_p": 0.6}, ("parameter",)),
    ((9, 40), {"zero_centered": True, "row_scale": True}, ("residual",)),
    ((6, 515), {"dropout_p": 0.1, "row_scale": True}, ()),
    ((5, 2048), {"dropout_p": 0.1, "zero_centered": True}, ("residual",)),
    ((3, 4101), {"dropout_p": 0.1, "row_scale": True}, ("residual", "parameter")),
]


@pytest.mark.parametrize("shape, options, wide", SUMS, ids=str)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_of_a_sum(op, shape, options, wide):
    inputs = inputs_of(op, shape, BF16, "cpu", **{f"{name}_dtype": F32 for name in wide})
    if "row_scale" in options:
        options = {**options, "row_scale": torch.randn(shape[0])}
    return assert_op_matches(*functions_of(op, "cuda", **options), inputs)


@pytest.mark.parametrize("shape, dtype", [((3, 4101), BF16), ((2, 16400), F32)], ids=str)
@pytest.mark.parametrize("op", ["add_layer_norm", "add_rms_norm"])
def test_rows_in_pieces_where_there_are_no_clusters(op, shape, dtype):
    with without_clusters():
        inputs = inputs_of(op, shape, dtype, "cpu")
        return assert_op_matches(*functions_of(op, "cuda", dropout_p=0.1), inputs)


@pytest.mark.parametrize("has_clusters", [True, False])
def test_far_from_zero(has_clusters):
    with contextlib.nullcontext() if has_clusters else without_clusters():
        x, _, *parameters = inputs_of("add_layer_norm", (5, 4101), F32, "cpu")
        return assert_op_matches(*plain("layer_norm"), (x + 1000, *parameters))


@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_optional_parameters(given):
    x, _, weight, bias = inputs_of("add_layer_norm", (9, 40), F32, "cpu")
    ours, eager, reference = plain("layer_norm")

    def with_given(function):
        if given == "bias":
            return lambda x, bias: function(x, None, bias)
        return lambda x, *weight: function(x, *weight, *[None] * (2 - len(weight)))

    inputs = {"weight": (x, weight), "bias": (x, bias), "neither": (x,)}[given]
    return assert_op_matches(*map(with_given, (ours, eager, reference)), inputs)


def test_unaligned_tensors_take_the_narrow_path():
    x, _, *parameters = inputs_of("add_layer_norm", (5, 64), F32, "cpu")
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(5, 64)
    ours, _, reference = plain("layer_norm")
    assert shifted.data_ptr() % 16 != 0
    truth = reference(*(t.double() for t in (x, *parameters)))
    assert_no_worse(ours(shifted, *parameters), ours(x, *parameters), truth)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_no_rows(op):
    x, _, *parameters = inputs_of(f"add_{op}", (0, 24), F32, "cpu")
    results = run_with_gradients(plain(op)[0], (x, *parameters))
    assert results["output 0"].shape == x.shape
    assert all((results[f"gradient {i}"] == 0).all() for i in range(len(parameters) + 1))


def test_not_finite_values_stay_in_their_row():
    x, _, *parameters = inputs_of("add_layer_norm", (20, 40), F32, "cpu")
    x[3, 3], x[7, 39] = float("nan"), float("inf")
    results = run_with_gradients(plain("layer_norm")[0], (x, *parameters))
    for name in ("output 0", "gradient 0"):
        is_spoilt = results[name].isnan().all(-1)
        assert is_spoilt.nonzero().flatten().tolist() == [3, 7]
        assert results[name][~is_spoilt].isfinite().all()


@pytest.mark.parametrize("N", [40, 515, 4101])
def test_the_output_is_the_norm_of_the_sum(N):
    x, residual, *parameters = inputs_of("add_layer_norm", (5, N), BF16, "cpu")
    y, total = sk.add_layer_norm(x, residual, N, *parameters, EPS, dropout_p=0.5, backend="cuda")
    assert torch.equal(y, plain("layer_norm")[0](total, *parameters))
