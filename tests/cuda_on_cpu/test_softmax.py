"""Softmax's CUDA kernels on the CPU: see conftest.py."""

import pytest
import torch

import slimkernels as sk
from slimkernels.ops.softmax import softmax_reference
from slimkernels.testing import assert_no_worse, assert_op_matches

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One warp a row (8 and 32 values a lane) and one block a row, aligned and not.
SHAPES = [(1, 1), (5, 37), (9, 64), (6, 256), (3, 515), (5, 1024), (9, 1500), (7, 4104)]


def definition(x, scale=1.0, is_causal=False):
    return softmax_reference(x, -1, scale, None, is_causal)


def eager(x, scale=1.0, is_causal=False):
    x = x * scale
    if is_causal:
        x = x.masked_fill(torch.ones(x.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.softmax(x, -1)


def on_cuda(x, scale=1.0, is_causal=False):
    return sk.softmax(x, -1, scale=scale, is_causal=is_causal, backend="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    x = (torch.randn(shape) * 4).to(dtype)
    return assert_op_matches(on_cuda, eager, definition, (x, 0.5))


@pytest.mark.parametrize("shape", [(7, 7), (2, 3, 130), (2, 20, 1100)], ids=str)
def test_causal_rows_see_their_own_index(shape):
    return assert_op_matches(on_cuda, eager, definition, (torch.randn(shape), -1.5, True))


def test_unaligned_rows_take_the_narrow_path():
    x = torch.randn(3 * 1032 + 1)[1:].view(3, 1032)
    assert_no_worse(on_cuda(x), definition(x), definition(x.double()))


@pytest.mark.parametrize("N", [40, 1200])
def test_not_finite_rows(N):
    x = torch.randn(20, N)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
    x[3] = -float("inf")
    x[4, : N // 2] = -float("inf")
    y, expected = on_cuda(x), definition(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_no_worse(y, expected, definition(x.double()))
