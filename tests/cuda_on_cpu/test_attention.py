"""Attention's Hopper kernel on the CPU, instruction by instruction: see conftest.py.

With threads in one order, products read their operands as late as they may; in the other, loads
land as late as they may (hopper_on_cpu.h).
"""

import os

import pytest
import torch
from attention_cases import attention_reference, cu_of
from attention_cases import call_of as checked_call

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.testing import assert_no_worse

OP = OPS["scaled_dot_product_attention"]
BF16, FP16 = torch.bfloat16, torch.float16
LATE = {"forward": "w", "reverse": "l"}
Variant = sk.AttentionVariant

# dtype, (B, H, Hkv, Tq, Tk, D, Dv), options. Several tiles of keys and, of 128 or 192, of queries.
# Heads that share keys share tiles where that makes fewer of them: not in the first two.
DENSE = {
    "64 wide": (BF16, (1, 2, 1, 100, 300, 64, 64), {}),
    "128 wide": (FP16, (1, 2, 1, 120, 330, 128, 128), {}),
    "256 wide": (BF16, (1, 1, 1, 130, 200, 256, 136), {}),
    "odd widths": (BF16, (1, 2, 2, 9, 70, 72, 40), {"scale": -0.2}),
    "causal": (BF16, (1, 2, 1, 260, 260, 128, 128), {"is_causal": True}),
    "three heads a tile": (BF16, (1, 6, 2, 50, 150, 128, 128), {"is_causal": True}),
    "window": (FP16, (1, 1, 1, 200, 330, 64, 64), {"variant": Variant(window=(60, 20))}),
    "offset": (
        *(BF16, (2, 1, 1, 200, 100, 64, 64)),
        {"is_causal": True, "variant": Variant(causal_offset=-70)},
    ),
    "softcap": (BF16, (1, 1, 1, 70, 140, 128, 128), {"variant": Variant(softcap=3.0)}),
    "lengths": (BF16, (3, 2, 1, 20, 200, 64, 64), {"key_lengths": [130, 0, 200]}),
}


def tensors(name):
    dtype, (B, H, Hkv, Tq, Tk, D, Dv), options = DENSE[name]
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], dtype=torch.int32)
    shapes = (B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
    return [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes], options


def check(inputs, options):
    """Output and lse of the kernel, no worse than eager's."""
    os.environ["HOPPER_ON_CPU"] = LATE[os.environ["CUDA_ON_CPU_ORDER"]]
    call = checked_call(inputs, options)
    assert OP.unsupported("cuda", *inputs, call) is None
    y, lse = OP.modules["cuda"].forward(*inputs, call)
    truth, true_lse = attention_reference(*(t.double() for t in inputs), call)
    eager, _ = attention_reference(*inputs, call, dtype=inputs[0].dtype)
    _, eager_lse = attention_reference(*inputs, call)  # in float32
    assert_no_worse(y, eager, truth, what="output")
    assert torch.equal(lse[0] == -torch.inf, true_lse == -torch.inf)
    finite = true_lse.isfinite()
    assert_no_worse(lse[0][finite], eager_lse[finite], true_lse[finite], floor=1e-6, what="lse")
    return y, lse


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    return check(*tensors(name))


def test_ragged():
    """Keys that end inside a tile have NaN behind them, another sequence's."""
    lengths_q, lengths_k = [130, 0, 7, 100], [140, 5, 0, 131]
    q = torch.randn(237, 2, 128).to(BF16)
    k, v = torch.randn(2, 276, 1, 128).to(BF16)
    k[140:145], v[140:145] = torch.nan, torch.nan  # a sequence without queries
    cu_seqlens = cu_of(lengths_q, q.device), cu_of(lengths_k, k.device)
    return check([q, k, v], {"cu_seqlens": cu_seqlens, "is_causal": True})


def test_equal_scores():
    """All keys weigh the same, to the last bit, whichever tile they are in: values that cancel give
    0."""
    q = torch.full((1, 1, 1, 64), 1.7, dtype=BF16)
    k, v = torch.full((1, 1, 640, 64), 2.3, dtype=BF16), torch.ones(1, 1, 640, 64, dtype=BF16)
    v[:, :, :320] = -1
    y, lse = check([q, k, v], {})
    assert not y.any()
    return y, lse


def test_packed_heads_have_their_own_bits():
    """Whether heads share tiles depends on the batch; which tiles of hidden keys a query visits
    depends on that, and nothing on these."""
    os.environ["HOPPER_ON_CPU"] = ""
    q, k, v = 4 * torch.randn(1, 4, 60, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    q, k, v = (t.to(FP16) for t in (q, k, v))
    call = checked_call([q, k, v], {"variant": Variant(window=(100, 0), causal_offset=200)})
    y, lse = OP.modules["cuda"].forward(q, k, v, call)
    for head in range(4):
        alone = OP.modules["cuda"].forward(q[:, head : head + 1], k, v, call)
        assert torch.equal(alone[0][:, 0], y[:, head])
        assert torch.equal(alone[1][:, :, 0], lse[:, :, head])
    return y, lse


REFUSED = {
    "dropout": {"dropout_p": 0.1},
    "bias": {"variant": Variant(bias=torch.zeros(1, 1, 9, 9, dtype=BF16))},
    "boolean mask": {"attn_mask": torch.ones(1, 1, 9, 9, dtype=torch.bool)},
    "ALiBi": {"variant": Variant(alibi_slopes=torch.ones(2))},
    "sinks": {"variant": Variant(sinks=torch.ones(2))},
    "relative bias": {"variant": Variant(relative_bias=sk.t5_relative_bias(torch.zeros(8, 2)))},
}


def test_refusals():
    inputs = torch.randn(3, 1, 2, 9, 64).to(BF16).unbind()
    for name, options in REFUSED.items():
        text = sk.explain("scaled_dot_product_attention", *inputs, **options)
        assert f"it has no {name}\n" in text
    for shape, dtype, sentence in (
        ((1, 2, 9, 264), BF16, "at most 256 wide and query's has 264"),
        ((1, 2, 9, 20), BF16, "a multiple of 8 and at most 256 wide and query's has 20"),
        ((1, 2, 9, 64), torch.float32, "for float16 and bfloat16 and input is torch.float32"),
    ):
        inputs = torch.randn(3, *shape).to(dtype).unbind()
        assert sentence in sk.explain("scaled_dot_product_attention", *inputs)
