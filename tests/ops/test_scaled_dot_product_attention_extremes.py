"""Attention where scores are as large as masks make them, and where what is read is not there."""

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import NAME, check, strided
from op_cases import KERNEL_BACKENDS, device_of, skip_unsupported

import slimkernels as sk
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

DTYPES = [torch.float32, torch.bfloat16]


def inputs_of(backend, Tq, Tk, dtype, B=2, H=2, D=16):
    return strided((B, Tq, H), (B, Tk, H), D, dtype, device_of(backend), swap=True)


# Hugging Face hides padding by the lowest number, others by -1e9 or -1e4; a row all of whose keys
# are hidden that way sees them all alike.
@pytest.mark.parametrize("mask", [-1e4, -1e9, "lowest"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Tq, Tk", [(3, 1200), (40, 1200), (20, 70)])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_rows_that_a_finite_mask_hides(backend, Tq, Tk, dtype, mask):
    inputs = inputs_of(backend, Tq, Tk, dtype, B=1, H=1)
    skip_unsupported(NAME, backend, *inputs)
    mask = torch.finfo(dtype).min if mask == "lowest" else mask
    bias = torch.zeros(1, 1, Tq, Tk, device=inputs[0].device, dtype=dtype)
    bias[:, :, : Tq // 2] = mask  # these rows as a whole
    bias[:, :, :, Tk // 2 :] = mask  # and of the others half

    def on(name):
        def attend(q, k, v, bias):
            return sk.scaled_dot_product_attention(q, k, v, bias, backend=name)

        return attend

    actual = run_with_gradients(on(backend), (*inputs, bias))
    # Not float64: the sum of score and mask is rounded in float32, which decides what is seen.
    expected = run_with_gradients(on("torch"), tuple(t.float() for t in (*inputs, bias)))
    # Sums of a thousand numbers are in another order, and so are products, which may round the
    # other way.
    rounding = 2 * torch.finfo(torch.float32).eps * 1e4 if mask == -1e4 else 0.0
    for name, value in expected.items():
        error = (actual[name].float() - value).abs().max()
        assert error <= (32 * torch.finfo(dtype).eps + rounding) * value.abs().max(), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_offsets_as_large_as_integers_get(backend):
    inputs = inputs_of(backend, 20, 30, torch.float32)
    skip_unsupported(NAME, backend, *inputs)
    for offset, window in ((2**29, (None, 2**29)), (-(2**29), (2**29, None)), (2**29, None)):
        variant = sk.AttentionVariant(causal_offset=offset, window=window)
        check(backend, inputs, {"variant": variant})
        check(backend, inputs, {"variant": variant, "is_causal": True})


def test_offsets_and_buckets_that_nobody_checked_touch_no_other_memory():
    # As on a GPU. The interpreter checks each address.
    module = sk.dispatch.OPS[NAME].modules["triton"]
    if isinstance(module, str):
        pytest.skip(module)
    inputs = inputs_of("triton", 20, 30, torch.float32)
    table = torch.randn(4, 2, device=inputs[0].device)
    good = torch.zeros(3, dtype=torch.int32, device=table.device)
    variant = sk.AttentionVariant(relative_bias=sk.RelativeBias(table, good))
    *_, call = sk.dispatch.OPS[NAME].arguments(*inputs, is_causal=True, variant=variant)
    buckets = torch.tensor([-(2**31), 2**31 - 1, 10**6], dtype=torch.int32, device=table.device)
    offsets = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32, device=table.device)
    call = call._replace(buckets=buckets, causal_offsets=offsets)
    y, lse = module.forward(*inputs, call)
    gradients = module.backward(y, None, *inputs, y, lse, call, (True,) * 3 + (False, False, True))
    for t in (y, *gradients[:3], gradients[5]):
        assert t.isfinite().all()


@pytest.mark.parametrize("Tk", [100, 127, 150])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_row_does_not_depend_on_how_far_its_cache_is_padded(backend, Tk):
    q, k, v = inputs_of(backend, 1, 1000, torch.float32)
    skip_unsupported(NAME, backend, q, k, v)
    lengths = torch.tensor([100, 60], dtype=torch.int32, device=q.device)
    variant = sk.AttentionVariant(batch_invariant=True)
    short, long = (
        sk.scaled_dot_product_attention(
            *(q, k[:, :, :T], v[:, :, :T]), key_lengths=lengths, variant=variant, backend=backend
        )
        for T in (Tk, 1000)
    )
    assert torch.equal(short, long)


@triton.jit
def _root(score, batch, head, i, j, tensors):
    return score / tl.sqrt(tl.abs(score))


@triton.jit
def _root_derivative(score, batch, head, i, j, tensors):
    return 0.5 / tl.sqrt(tl.abs(score))


def test_a_score_function_that_is_not_finite_where_nothing_is():
    # The product with a query that does not exist is 0, whose root has no derivative.
    inputs = inputs_of("triton", 20, 70, torch.float32)
    root = sk.ScoreFunction(
        score=_root, derivative=_root_derivative, torch_score=lambda s, *_: s / s.abs().sqrt()
    )
    variant = sk.AttentionVariant(score=root)

    def on(backend):
        def attend(q, k, v):
            return sk.scaled_dot_product_attention(q, k, v, variant=variant, backend=backend)

        return attend

    actual, eager = (run_with_gradients(on(name), inputs) for name in ("triton", "torch"))
    truth = run_with_gradients(on("torch"), tuple(t.double() for t in inputs))
    for name, expected in truth.items():
        assert_no_worse(actual[name], eager[name], expected, what=name)


# Where tanh is almost 1, 1 - tanh^2 in float32 has no digit left, and all gradients are as small.
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_the_slope_of_a_saturated_softcap(backend):
    torch.manual_seed(0)
    device = device_of(backend)
    signs = torch.randn(40, 1, device=device).sign()
    q, k = (x + 0.05 * torch.randn(1, 2, 40, 16, device=device) for x in (1.0, signs))
    inputs = q, k * 0.5, torch.randn(1, 2, 40, 16, device=device)
    variant = sk.AttentionVariant(softcap=1.0)
    skip_unsupported(NAME, backend, *inputs, scale=1.0, variant=variant)

    def ours(q, k, v):
        return sk.scaled_dot_product_attention(q, k, v, scale=1.0, variant=variant, backend=backend)

    def exact(q, k, v):  # torch's own slope in float32 is 1 - tanh^2
        return torch.softmax((q @ k.mT).double().tanh().to(q.dtype), -1) @ v

    assert_op_matches(ours, exact, exact, inputs)
