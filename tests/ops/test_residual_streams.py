"""What add_layer_norm and add_rms_norm do with the branch and the residual stream alike."""

import pytest
import torch
from op_cases import DTYPES, KERNEL_BACKENDS, device_of
from residual_cases import check, functions_of, inputs_of, mask_of

import slimkernels as sk
from slimkernels.ops._dropout import draw_seed
from slimkernels.testing import assert_no_worse, run_with_gradients

OPS = ["add_layer_norm", "add_rms_norm"]
every_op = pytest.mark.parametrize("op", OPS)
every_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


def scales(device):
    """Of the rows of (2, 5, 64): skipped ones, as stochastic depth has them, and others."""
    return torch.tensor([[0.0], [1.25]], device=device)


@every_op
@every_backend
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_in_float32(op, backend, dtype, dropout_p, compiled):
    device = device_of(backend)
    inputs = inputs_of(op, (2, 5, 64), dtype, device, torch.float32, torch.float32)
    options = dict(dropout_p=dropout_p, row_scale=scales(device) if dropout_p else None)
    check(op, backend, inputs, compiled, **options)
    y, total = functions_of(op, backend, **options)[0](*inputs)
    assert y.dtype == dtype and total.dtype == torch.float32


@every_op
@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_scaled_rows(op, backend, dtype, dropout_p):
    device = device_of(backend)
    inputs = inputs_of(op, (2, 5, 64), dtype, device)
    check(op, backend, inputs, dropout_p=dropout_p, row_scale=scales(device))
    full = torch.rand(2, 5, device=device)
    check(op, backend, inputs, dropout_p=dropout_p, row_scale=full)


@every_op
@every_backend
def test_a_skipped_branch_leaves_the_residual(op, backend):
    x, residual, *parameters = inputs_of(op, (6, 33), torch.float32, device_of(backend))
    check(op, backend, (x, residual, *parameters))  # skips
    row_scale = torch.tensor([0.0, 1, 2, 0, 0, 1], device=x.device)
    ours, _, _ = functions_of(op, backend, row_scale=row_scale)
    results = run_with_gradients(ours, (x, residual, *parameters))
    assert torch.equal(results["output 1"][row_scale == 0], residual[row_scale == 0])
    assert torch.equal(results["gradient 0"], results["gradient 1"] * row_scale[:, None])


@every_op
@pytest.mark.parametrize("shape", [(2, 1), (2, 1, 1), (5,), (2, 5), ()], ids=str)
def test_what_broadcasts_to_the_rows_scales_them(op, shape):
    x, residual, *parameters = inputs_of(op, (2, 5, 16), torch.float32, "cpu")
    row_scale = torch.rand(shape)
    y, total = getattr(sk, op)(x, residual, 16, *parameters, row_scale=row_scale)
    full = row_scale.view(2, 1, 1) if shape == (2, 1, 1) else row_scale[..., None]
    truth = residual.double() + x.double() * full.double()
    assert_no_worse(total, residual + x * full, truth)


@every_op
@every_backend
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_weight_that_is_centred_at_zero(op, backend, dtype):
    inputs = inputs_of(op, (9, 37), dtype, device_of(backend))
    check(op, backend, inputs, zero_centered=True)
    check(op, backend, inputs, zero_centered=True, dropout_p=0.3)
    check(op, backend, inputs[:2], zero_centered=True)


# Past what a Triton program holds, in backward for float32 as well, and past what the CPU sums by
# rows.
@every_op
@every_backend
@pytest.mark.parametrize("dropout_p", [0.0, 0.6])
@pytest.mark.parametrize("shape", [(3, 5000), (2, 17000)], ids=str)
def test_long_rows(op, backend, shape, dropout_p):
    device = device_of(backend)
    inputs = inputs_of(op, shape, torch.bfloat16, device, torch.float32)
    check(op, backend, inputs, dropout_p=dropout_p)
    inputs = inputs_of(op, shape, torch.float32, device)
    row_scale = torch.rand(shape[0], device=device)
    check(op, backend, inputs, dropout_p=dropout_p, row_scale=row_scale if dropout_p else None)


@every_op
@every_backend
def test_gradients_share_no_memory(op, backend):
    # Without dropout both inputs get the same numbers.
    inputs = inputs_of(op, (3, 16), torch.float32, device_of(backend))
    check(op, backend, inputs)  # skips
    leaves = [t.requires_grad_() for t in inputs]
    y, total = functions_of(op, backend)[0](*leaves)
    (y.square().sum() + total.sum()).backward()
    addresses = {t.grad.untyped_storage().data_ptr() for t in leaves}
    assert len(addresses) == len(leaves)


@every_op
@every_backend
def test_non_contiguous_tensors(op, backend):
    x, residual, *parameters = inputs_of(op, (6, 4, 24), torch.float32, device_of(backend))
    check(op, backend, (x, residual, *parameters))  # skips
    ours, _, _ = functions_of(op, backend)

    def strided(x, residual):
        results = ours(x.transpose(0, 1), residual.transpose(0, 1), *parameters)
        return tuple(t.transpose(0, 1) for t in results)

    dense = run_with_gradients(lambda x, residual: ours(x, residual, *parameters), (x, residual))
    for name, t in run_with_gradients(strided, (x, residual)).items():
        assert torch.equal(t, dense[name]), name


@every_op
@every_backend
def test_what_is_dropped_does_not_matter(op, backend):
    # Selected, not multiplied by zero: infinity and NaN go too.
    inputs = inputs_of(op, (6, 20), torch.float32, device_of(backend))
    check(op, backend, inputs)  # skips
    x = inputs[0]
    torch.manual_seed(7)
    keep = mask_of(x, draw_seed(x.device), 0.5)
    ours, _, _ = functions_of(op, backend, dropout_p=0.5)
    spoilt = torch.where(keep, x, float("nan"))
    for a, b in zip(ours(x, *inputs[1:]), ours(spoilt, *inputs[1:]), strict=True):
        assert torch.equal(a, b)


X = torch.randn(4, 3, 8)


@every_op
@pytest.mark.parametrize(
    "residual, options, sentence",
    [
        ([1.0], {}, "residual must be a tensor; got list"),
        (X[:3], {}, r"residual must have input's shape \(4, 3, 8\); got \(3, 3, 8\)"),
        (X.half(), {}, "residual must be torch.float32 like input, or float32; got torch.float16"),
        (X.to("meta"), {}, "residual must be on cpu like input; got meta"),
        (X, {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        (X, {"zero_centered": 1}, "zero_centered must be True or False; got 1"),
        (X, {"row_scale": 1.0}, "row_scale must be a tensor; got float"),
        (
            X,
            {"row_scale": X[:, :2, 0]},
            r"row_scale must broadcast to the rows \(4, 3\).*\(4, 2\)",
        ),
        (X, {"row_scale": X}, r"row_scale must broadcast to the rows \(4, 3\) .*\(4, 3, 8\)"),
        (X, {"row_scale": X[..., 0].half()}, "row_scale must be float32; got torch.float16"),
        (X, {"row_scale": X[..., 0].to("meta")}, "row_scale must be on cpu like input; got meta"),
        (
            X,
            {"row_scale": torch.ones(4, 3, requires_grad=True)},
            "row_scale must not require a gradient",
        ),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(op, backend, residual, options, sentence):
    with pytest.raises(ValueError, match=f"^{op}: {sentence}"):
        getattr(sk, op)(X, residual, 8, **options, backend=backend)
