"""The random bits behind every dropout: alike on all backends, and random enough."""

import pytest
import torch
import triton
import triton.language as tl
from op_cases import device_of

from slimkernels.backends.triton import _common
from slimkernels.ops._dropout import _bits, draw_seed, keep_mask, threshold

ROWS, COLS = 64, 256


def mask_of(seed, dropout_p, rows=ROWS, cols=COLS, first_row=0):
    at = torch.arange(first_row, first_row + rows)[:, None]
    return keep_mask(seed, at, torch.arange(cols)[None, :], dropout_p)


@triton.jit
def _mask_kernel(seed_ptr, y_ptr, first_row, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    key0, key1 = _common.row_keys(seed_ptr, rows.to(tl.int64) + first_row)
    keep = _common.keep_mask(key0[:, None], key1[:, None], cols[None, :], threshold)
    tl.store(y_ptr + rows[:, None] * COLS + cols[None, :], keep.to(tl.int8))


@pytest.mark.parametrize("first_row", [0, 2**31 - 3, 2**32 - 5, 2**40])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.999])
def test_triton_computes_the_definition(dropout_p, first_row):
    torch.manual_seed(1)
    seed = draw_seed(device_of("triton"))
    y = torch.empty(ROWS, COLS, dtype=torch.int8, device=seed.device)
    _mask_kernel[(1,)](seed, y, first_row, threshold(dropout_p), ROWS=ROWS, COLS=COLS)
    assert torch.equal(y.bool().cpu(), mask_of(seed.cpu(), dropout_p, first_row=first_row))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 0.9])
def test_rate(dropout_p):
    torch.manual_seed(2)
    n = 400 * 1000
    kept = mask_of(draw_seed(torch.device("cpu")), dropout_p, 400, 1000).double().mean().item()
    # Five standard deviations of a binomial proportion.
    assert abs(kept - (1 - dropout_p)) <= 5 * (dropout_p * (1 - dropout_p) / n) ** 0.5


def test_neighbours_are_independent():
    torch.manual_seed(3)
    keep = mask_of(draw_seed(torch.device("cpu")), 0.5, 512, 512).double() * 2 - 1
    for shift in ((0, 1), (1, 0), (1, 1), (0, 16), (16, 0), (1, -1), (0, 256), (256, 0)):
        correlation = (keep * keep.roll(shift, (0, 1))).mean().item()
        assert abs(correlation) <= 5 / 512, shift  # five standard deviations of 512^2 signs


def test_every_bit_is_fair():
    torch.manual_seed(4)
    words = _bits(draw_seed(torch.device("cpu")), torch.arange(512)[:, None], torch.arange(512))
    for bit in range(32):
        assert abs(((words >> bit) & 1).double().mean().item() - 0.5) <= 5 / (2 * 512), bit


def test_seeds_give_other_masks():
    a, b = (mask_of(torch.tensor([s]), 0.5, 512, 512) for s in (7, 7 + 2**32))
    assert abs((a == b).double().mean().item() - 0.5) <= 5 / (2 * 512)
