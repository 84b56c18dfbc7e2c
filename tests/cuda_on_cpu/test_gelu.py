"""The CUDA kernels of gelu, silu and relu_squared on the CPU: see conftest.py."""

import pytest
import torch

import slimkernels as sk
from slimkernels.ops._activation import EAGER, activation_reference
from slimkernels.testing import assert_op_matches, run_with_gradients

CALLS = {
    "gelu": lambda x, bias=None: sk.gelu(x, bias=bias, backend="cuda"),
    "gelu_tanh": lambda x, bias=None: sk.gelu(x, approximate="tanh", bias=bias, backend="cuda"),
    "silu": lambda x, bias=None: sk.silu(x, bias=bias, backend="cuda"),
    "relu_squared": lambda x, bias=None: sk.relu_squared(x, bias=bias, backend="cuda"),
}
HALVES = torch.float16, torch.bfloat16
# One column, an odd row, aligned rows of less than a warp's and of more than one block's columns.
ROWS = [(5, 1), (3, 37), (70, 24), (9, 520)]


def same(x):
    return x


def unaligned(x):
    """The same numbers, an element past a 16-byte boundary."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def check(curve, *inputs, place_x=same, place_bias=same):
    def ours(x, bias=None):
        return CALLS[curve](place_x(x), None if bias is None else place_bias(bias))

    def eager(x, bias=None):
        return EAGER[curve](x if bias is None else x + bias).to(x.dtype)

    def definition(x, bias=None):
        return activation_reference(x, bias, curve)

    return assert_op_matches(ours, eager, definition, inputs)


@pytest.mark.parametrize(
    "curve, dtype",
    [*((curve, torch.float32) for curve in CALLS), *(("gelu", dtype) for dtype in HALVES)],
    ids=str,
)
def test_matches_reference(curve, dtype):
    # The tail of the last is not a whole pack of 16 bytes.
    results = [check(curve, torch.randn(n).mul(3).to(dtype)) for n in (1, 2080, 4099)]
    for shape in ROWS:
        x, bias = torch.randn(shape).mul(3).to(dtype), torch.randn(shape[1:])
        results += check(curve, x, bias.to(dtype)), check(curve, x, bias)
    return results


@pytest.mark.parametrize("curve", CALLS)
def test_unaligned_tensors_take_the_narrow_path(curve):
    x, bias = torch.randn(9, 40), torch.randn(40)
    return (
        check(curve, x, place_x=unaligned),
        check(curve, x, bias, place_x=unaligned),
        check(curve, x, bias, place_bias=unaligned),
    )


@pytest.mark.parametrize("curve", CALLS)
def test_extremes(curve):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1e-40, 1e4, -1e4, 40.0, -40.0, 1e18, -1e18, inf, -inf, nan])
    dy = (torch.ones_like(x),)
    ours = run_with_gradients(CALLS[curve], (x,), dy)
    truth = run_with_gradients(lambda x: activation_reference(x, None, curve), (x,), dy)
    for name in truth:
        rtol = 8 * torch.finfo(torch.float32).eps  # element by element
        torch.testing.assert_close(ours[name], truth[name], rtol=rtol, atol=0, equal_nan=True)


def test_negative_tail_keeps_its_relative_accuracy():
    z = torch.linspace(-9, 0, 901)[:-1]
    y, truth = CALLS["gelu"](z).double(), activation_reference(z.double(), None, "gelu")
    exponent = truth.div(z).log().abs() + 8  # rounded in float32
    assert ((y - truth) / truth / exponent).abs().max() < 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_empty(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[-1:], requires_grad=True)
    CALLS["gelu"](x, bias).sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias)) and x.grad.shape == shape
