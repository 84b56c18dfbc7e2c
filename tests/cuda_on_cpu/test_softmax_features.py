"""Masks, sinks and long rows in softmax's CUDA kernels on the CPU: see conftest.py."""

import pytest
import torch
from softmax_cases import eager_softmax

import slimkernels as sk
from slimkernels.ops.softmax import softmax_reference
from slimkernels.testing import assert_op_matches

INF, NAN = float("inf"), float("nan")


def check(x, mask=None, sinks=None, scale=0.5, is_causal=False):
    """Of a call, its result and the gradients of x, an added mask and the sinks."""

    def ours(x, mask, sinks):
        how = dict(scale=scale, is_causal=is_causal, backend="cuda")
        return sk.softmax(x, mask=mask, sinks=sinks, **how)

    def eager(x, mask, sinks):
        return eager_softmax(x, scale=scale, mask=mask, is_causal=is_causal, sinks=sinks)

    def definition(x, mask, sinks):
        mask = None if mask is None else mask.expand(x.shape)
        return softmax_reference(x, -1, scale, mask, is_causal, sinks)

    return assert_op_matches(ours, eager, definition, (x, mask, sinks))


def mask_of(shape, dtype):
    shows = torch.rand(shape) < 0.7
    if len(shape) > 1:
        shows[..., -1:, :] = False  # these rows see nothing
    if dtype == torch.bool:
        return shows
    return torch.randn(shape).to(dtype).where(shows, -INF)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [40, 37])
def test_masks_are_read_through_their_strides(N, mask_dtype):
    dtype = torch.float32 if mask_dtype == torch.float32 else torch.bfloat16
    results = []
    for shape in [(2, 3, 5, N), (5, N), (2, 1, 1, N), (2, 1, 5, N), (3, 1, 1), (5, 1), (1,)]:
        x = torch.randn(2, 3, 5, N).to(dtype)
        results.append(check(x, mask_of(shape, mask_dtype), is_causal=shape == (5, N)))
    return results


def test_an_unaligned_mask_beside_aligned_rows():
    x = torch.randn(3, 64)
    # Rows that begin a byte past where packs may be loaded, and rows of other lengths.
    return [check(x, mask_of((3, N), torch.bool)[:, 1:65]) for N in (68, 66)]


@pytest.mark.parametrize("shape", [(2, 3, 4, 33), (2, 1, 1100)], ids=str)
def test_sinks(shape):
    # Below the scores' maximum and above it.
    sinks = torch.linspace(-3, 12, shape[-3])
    mask = mask_of(shape[-2:], torch.bool)
    return check(torch.randn(shape), sinks=sinks), check(torch.randn(shape), mask, sinks)


def test_sinks_of_the_inputs_dtype():
    x = torch.randn(3, 5, 40).to(torch.float16)
    return check(x, sinks=torch.randn(3).to(x.dtype)), check(x, sinks=torch.randn(3))


@pytest.mark.parametrize("N", [40, 1100])
def test_what_is_hidden_is_not_looked_at_and_what_is_not_finite_is_seen(N):
    x, mask = torch.randn(6, N), torch.zeros(6, N)
    mask[:, 3] = -INF
    x[0, 3], x[1, 3] = NAN, INF  # hidden
    x[2], x[3, 5], x[4, 5] = -INF, NAN, INF
    mask[5], x[5] = -INF, NAN
    y = sk.softmax(x, mask=mask, backend="cuda")
    assert y[:2].isfinite().all() and y[2:5].isnan().all() and not y[5].any()
    return y


# Two blocks that share a row, and one that walks it twice where there are no clusters.
@pytest.mark.parametrize("N, capability", [(8200, "90"), (8203, "90"), (8200, "80")])
def test_long_rows(N, capability):
    x, sinks = torch.randn(1, 2, 1, N), torch.tensor([1.0, 9.0])
    mask = torch.randn(2, 1, N).where(torch.rand(2, 1, N) < 0.7, -INF)
    mask[0, 0, :5000] = -INF  # all that some threads have
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_ON_CPU_CAPABILITY", capability)
        return check(x, mask, sinks)


def test_other_dimensions_and_dropout_are_refused_in_a_sentence():
    x = torch.randn(3, 5)
    for options, sentence in (
        ({"dim": 0}, "it is written for rows, dim -1"),
        ({"dim": 1, "dropout_p": 0.1}, "it has no dropout"),
    ):
        with pytest.raises(sk.BackendError, match=sentence):
            sk.softmax(x, **options, backend="cuda")
