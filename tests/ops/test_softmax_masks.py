"""Softmax's masks: every way to broadcast, and the same bits as the mask written out."""

import itertools

import pytest
import torch
from op_cases import DTYPES, device_of, skip_unsupported
from softmax_cases import FOUR, check, every_backend, every_backend_and_cut, inputs_of

import slimkernels as sk
from slimkernels.backends._mask import mask_rows
from slimkernels.testing import run_with_gradients


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("broadcast", list(itertools.product([True, False], repeat=4)), ids=str)
@every_backend
def test_mask_broadcasts_over_any_dimensions(backend, broadcast, is_causal):
    x = inputs_of(FOUR, torch.float32, device_of(backend))
    skip_unsupported("softmax", backend, x)
    sizes = [1 if wide else n for wide, n in zip(broadcast, FOUR, strict=True)]
    mask = torch.rand(sizes, device=x.device) < 0.6
    mask.view(-1)[::3] = False
    mask.view(-1)[1::3] = True
    for given in (mask, mask.squeeze(0)):
        results = [
            run_with_gradients(
                lambda x, m=m: sk.softmax(x, mask=m, is_causal=is_causal, backend=backend), (x,)
            )
            for m in (given, given.expand(FOUR).contiguous())
        ]
        for name, expected in results[1].items():
            assert torch.equal(results[0][name], expected), name
    check(backend, x, {"mask": mask, "is_causal": is_causal})


def padding_mask(x):
    """Rows that see a prefix: all, one, none, and some of the columns."""
    lengths = torch.tensor([x.shape[-1], 1, 0, 9, 16, 17], device=x.device)
    return torch.arange(x.shape[-1], device=x.device) < lengths[: x.shape[0]].view(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [34, 64])
@every_backend_and_cut
def test_padding_mask(backend, N, dtype, cut):
    x = inputs_of((6, 1, 4, N), dtype, device_of(backend))
    mask = padding_mask(x)
    check(backend, x, {"mask": mask})
    check(backend, x, {"mask": mask, "is_causal": True})
    # Nothing at the end of a row, and something in its middle.
    check(backend, x, {"mask": mask.flip(-1)})
    check(backend, x, {"mask": mask.roll(3, -1)})


@pytest.mark.parametrize("dim", [-4, -3, -2, -1, 0, 1, 2, 3])
@pytest.mark.parametrize("sizes", [FOUR, (3, 1, 34), (2, 1, 5, 1), (1,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@every_backend
def test_any_dimension(backend, dtype, sizes, dim):
    x = inputs_of(FOUR, dtype, device_of(backend))
    check(backend, x, {"dim": dim})
    check(backend, x, {"dim": dim, "scale": 3.0, "mask": torch.rand(sizes, device=x.device) < 0.6})


@pytest.mark.parametrize("dim", [0, -1])
@every_backend
def test_one_dimension(backend, dim):
    x = inputs_of((19,), torch.float32, device_of(backend))
    check(backend, x, {"dim": dim})
    check(backend, x, {"dim": dim, "mask": torch.arange(19, device=x.device) % 3 > 0})


def mask_of(sizes, strides=None):
    flat = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.5
    return flat.as_strided(sizes, strides or torch.empty(sizes).stride())


# The shape of input, a mask, and how many bytes are copied before a kernel reads it.
LAYOUTS = {
    "dense": (FOUR, mask_of(FOUR), 0),
    "over heads": (FOUR, mask_of((2, 1, 5, 34)), 0),
    "per head": (FOUR, mask_of((1, 3, 1, 34)), 0),
    "padding": (FOUR, mask_of((2, 1, 1, 34)), 0),
    "whole rows": (FOUR, mask_of((2, 3, 5, 1)), 0),
    "a slice of each row": (FOUR, mask_of(FOUR, (700, 200, 40, 1)), 0),
    "queries in steps": (FOUR, mask_of((1, 1, 5, 34), (0, 0, 90, 1)), 0),
    "one": (FOUR, mask_of((1, 1, 1, 1)), 0),
    "two alternations": ((2, 3, 2, 3, 34), mask_of((1, 3, 2, 1, 34)), 0),
    "three alternations": ((2, 3, 2, 3, 34), mask_of((2, 1, 2, 1, 34)), 2 * 3 * 2 * 3 * 34),
    "other columns first": (FOUR, mask_of(FOUR, (1, 2, 6, 30)), 2 * 3 * 5 * 34),
    "every second column": (FOUR, mask_of((2, 1, 1, 34), (68, 68, 68, 2)), 2 * 34),
    "heads before batches": (FOUR, mask_of((2, 3, 1, 34), (34, 68, 1, 1)), 0),
    "heads before batches, in steps": (FOUR, mask_of((2, 3, 5, 34), (34, 80, 250, 1)), 0),
    "four runs": ((2, 3, 2, 3, 34), mask_of((2, 3, 2, 3, 34), (40, 80, 250, 600, 1)), 36 * 34),
    "dimensions of one between": (
        (2, 1, 3, 1, 5, 34),
        mask_of((2, 1, 3, 1, 5, 34), (510, 7, 170, 9, 34, 1)),
        0,
    ),
    "one column": ((2, 3, 5, 1), mask_of((2, 3, 5, 1), (90, 30, 5, 7)), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_a_mask(layout):
    shape, mask, copied = LAYOUTS[layout]
    mask = mask.expand(shape)
    rows = mask_rows(mask)
    row, col = torch.arange(mask.numel() // shape[-1]), torch.arange(shape[-1])
    block = row // rows.inner
    starts = block // rows.middle * rows.stride_outer
    starts += block % rows.middle * rows.stride_middle + row % rows.inner * rows.stride_inner
    at = starts[:, None] + col * rows.stride_col
    memory = rows.mask.as_strided((int(at.max()) + 1,), (1,))
    assert torch.equal(memory[at], mask.reshape(-1, shape[-1]))
    assert rows.stride_col in (0, 1)
    storage = rows.mask.untyped_storage()
    shared = storage.data_ptr() == mask.untyped_storage().data_ptr()
    assert copied == (0 if shared else storage.nbytes())


@pytest.mark.parametrize("layout", LAYOUTS)
@every_backend_and_cut
def test_mask_of_any_layout(backend, layout, cut):
    shape, mask, _ = LAYOUTS[layout]
    device = device_of(backend)
    x = inputs_of(shape, torch.float32, device)
    strided = torch.empty_strided(mask.shape, mask.stride(), dtype=torch.bool, device=device)
    strided.copy_(mask)
    skip_unsupported("softmax", backend, x, mask=strided)
    y = sk.softmax(x, mask=strided, backend=backend)
    assert torch.equal(y, sk.softmax(x, mask=mask.to(device).contiguous(), backend=backend))
