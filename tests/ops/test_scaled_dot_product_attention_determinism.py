"""Attention's bits: the same on every run, and of a row whatever else is in the batch."""

import pytest
import torch
from attention_cases import NAME, cu_of
from op_cases import KERNEL_BACKENDS, device_of, skip_unsupported

import slimkernels as sk
from slimkernels.testing import run_with_gradients

H, GROUP, D, DV = 4, 2, 16, 24


def rich(B, Tq, Tk, device, **fields):
    """Every feature whose parameters the batch shares, and the mask of a batch (B, 1, Tq, Tk)."""
    torch.manual_seed(1)
    table = torch.randn(16, H, device=device)
    variant = sk.AttentionVariant(
        bias=torch.randn(1, H, Tq, Tk, device=device),
        window=(Tk // 2, None),
        causal_offset=Tk // 3,
        alibi_slopes=torch.rand(H, device=device),
        softcap=5.0,
        sinks=torch.randn(H, device=device),
        relative_bias=sk.t5_relative_bias(table, max_distance=20),
        **fields,
    )
    return {
        "attn_mask": torch.rand(B, 1, Tq, Tk, device=device) < 0.8,
        "is_causal": True,
        "enable_gqa": True,
        "variant": variant,
    }


def inputs_of(B, Tq, Tk, dtype, device):
    torch.manual_seed(0)
    shapes = (B, H, Tq, D), (B, H // GROUP, Tk, D), (B, H // GROUP, Tk, DV)
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in shapes)


def attend(backend, options):
    def ours(query, key, value):
        torch.manual_seed(2)
        return sk.scaled_dot_product_attention(
            query, key, value, **options, return_lse=True, backend=backend
        )

    return ours


@pytest.mark.parametrize("Tq", [3, 40])  # few queries have kernels of their own
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_twenty_runs_have_the_same_bits(backend, Tq):
    device = device_of(backend)
    # The interpreter has no threads that could differ, and takes its time.
    is_interpreted = backend == "triton" and device.type == "cpu"
    B, repeats = (1, 1) if is_interpreted else (3, 19)
    inputs = inputs_of(B, Tq, 150, torch.float32, device)
    options = rich(B, Tq, 150, device) | {"dropout_p": 0.2}
    skip_unsupported(NAME, backend, *inputs, **options)
    bias = options["variant"].bias.requires_grad_()

    def run():
        torch.manual_seed(2)
        leaves = [t.detach().requires_grad_() for t in inputs]
        y, lse = attend(backend, options)(*leaves)
        return y, lse, *torch.autograd.grad((y.sum() + lse.sum()) * y.std(), (*leaves, bias))

    first = run()
    for _ in range(repeats):
        for expected, actual in zip(first, run(), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "Tq, dtype", [(1, torch.bfloat16), (3, torch.float32), (40, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend, Tq, dtype):
    device, Tk = device_of(backend), 1100 if Tq < 16 else 70
    options = rich(3, Tq, Tk, device, batch_invariant=True)
    inputs = inputs_of(3, Tq, Tk, dtype, device)
    skip_unsupported(NAME, backend, *inputs, **options)
    dys = torch.randn(3, H, Tq, DV, device=device).to(dtype), torch.randn(3, H, Tq, device=device)
    whole = run_with_gradients(attend(backend, options), inputs, dys)
    for one in (slice(0, 1), slice(1, 3)):
        part = options | {"attn_mask": options["attn_mask"][one]}
        alone = run_with_gradients(
            attend(backend, part), tuple(t[one] for t in inputs), tuple(dy[one] for dy in dys)
        )
        for name, actual in alone.items():
            assert torch.equal(actual, whole[name][one]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_a_sequence_does_not_depend_on_its_ragged_batch(backend, dtype):
    device, lengths = device_of(backend), [5, 40, 1, 33]
    torch.manual_seed(0)
    inputs = tuple(
        torch.randn(sum(lengths), heads, width, device=device).to(dtype)
        for heads, width in ((H, D), (H // GROUP, D), (H // GROUP, DV))
    )
    options = rich(1, 40, 40, device, batch_invariant=True)
    skip_unsupported(NAME, backend, *inputs, **options, cu_seqlens=cu_of(lengths, device))
    whole = run_with_gradients(
        attend(backend, options | {"cu_seqlens": cu_of(lengths, device)}), inputs
    )
    second = slice(5, 45)
    alone = run_with_gradients(
        attend(backend, options | {"cu_seqlens": cu_of([40], device)}),
        tuple(t[second] for t in inputs),
        (torch.zeros(40, H, DV, device=device).to(dtype), torch.zeros(H, 40, device=device)),
    )
    assert torch.equal(alone["output 0"], whole["output 0"][second])
    assert torch.equal(alone["output 1"], whole["output 1"][:, second])
