"""The gradients of attention's Hopper kernels on the CPU, as test_attention.py has its forward."""

import os

import pytest
import torch
from attention_cases import attention_reference, call_of, cu_of

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.testing import assert_no_worse

OP = OPS["scaled_dot_product_attention"]
BF16, FP16 = torch.bfloat16, torch.float16
LATE = {"forward": "w", "reverse": "l"}
Variant = sk.AttentionVariant

# dtype, (B, H, Hkv, Tq, Tk, D, Dv), options, whether lse has a gradient.
DENSE = {
    "64 wide, window": (
        *(FP16, (1, 1, 1, 140, 200, 64, 64)),
        *({"variant": Variant(window=(60, 20))}, False),
    ),
    "128 wide, lse": (BF16, (1, 2, 1, 70, 150, 128, 128), {}, True),
    "causal, some see nothing": (
        *(BF16, (2, 1, 1, 150, 140, 64, 64)),
        *({"is_causal": True, "variant": Variant(causal_offset=-70)}, True),
    ),
    "softcap": (
        *(BF16, (1, 1, 1, 70, 140, 128, 128)),
        *({"is_causal": True, "variant": Variant(softcap=3.0)}, False),
    ),
    "256 wide": (
        *(BF16, (1, 2, 1, 70, 100, 256, 136)),
        *({"is_causal": True, "variant": Variant(causal_offset=20, softcap=4.0)}, True),
    ),
    "lengths, odd widths": (
        *(BF16, (2, 1, 1, 20, 150, 72, 40)),
        *({"scale": -0.2, "key_lengths": [130, 0]}, False),
    ),
}


def definition(call, dtype=None):
    return lambda *inputs: attention_reference(*inputs, call, dtype=dtype)


def gradients(function, inputs, dys):
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)[: len(dys)]
    dys = [dy.to(y) for dy, y in zip(dys, outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, dys)


def check(inputs, options, with_lse=False):
    """The kernels' gradients, from what forward would have saved, no worse than eager's."""
    os.environ["HOPPER_ON_CPU"] = LATE[os.environ["CUDA_ON_CPU_ORDER"]]
    os.environ["CUDA_ON_CPU_RESIDENT"] = "2"  # blocks that add to one dq take turns
    call = call_of(inputs, options)
    wide = [t.double() for t in inputs]
    y, lse = attention_reference(*wide, call)
    dys = [torch.randn(t.shape).bfloat16() for t in (y, lse)][: 1 + with_lse]
    truth = gradients(definition(call), wide, dys)
    eager = gradients(definition(call, inputs[0].dtype), inputs, dys)
    high = lse.float()
    saved = y.to(inputs[0]), torch.stack([high, (lse - high).nan_to_num(0).float()])
    dy, dlse = dys[0].to(inputs[0]), dys[1].float() if with_lse else None
    wanted = (True,) * 3 + (False,) * 3
    found = OP.modules["cuda"].backward(dy, dlse, *inputs, *saved, call, wanted)[:3]
    for name, *three in zip("qkv", found, eager, truth, strict=True):
        assert_no_worse(*three, what=f"gradient of {name}")
    return found


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    dtype, (B, H, Hkv, Tq, Tk, D, Dv), options, with_lse = DENSE[name]
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(options["key_lengths"], dtype=torch.int32)
    shapes = (B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv)
    inputs = [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]
    return check(inputs, options, with_lse)


def test_ragged():
    """A sequence without keys, one without queries, and one whose NaN nobody else may see: its
    tokens follow the first sequence's inside a tile."""
    lengths_q, lengths_k = [70, 9, 7, 0, 100], [140, 5, 0, 20, 131]
    q = torch.randn(186, 2, 64).to(BF16)
    k, v = torch.randn(2, 296, 1, 64).to(BF16)
    q[70:79], k[140:145], v[140:145] = torch.nan, torch.nan, torch.nan
    cu_seqlens = cu_of(lengths_q, q.device), cu_of(lengths_k, k.device)
    dq, dk, dv = check([q, k, v], {"cu_seqlens": cu_seqlens, "is_causal": True})
    assert not dq[79:86].any(), "queries of a sequence without keys"
    assert not dk[145:165].any() and not dv[145:165].any(), "keys of one without queries"
    return dq, dk, dv


def test_what_is_wanted():
    """Frozen tensors, and tensors without elements."""
    os.environ["HOPPER_ON_CPU"] = ""
    q, k, v = torch.randn(3, 1, 1, 70, 64).to(BF16).unbind()
    results = [through_op([q, k, v], wanted) for wanted in ("qkv", "q", "k", "v")]
    for name, alone in zip("qkv", results[1:], strict=True):
        assert list(alone) == [name] and torch.equal(results[0][name], alone[name])
    nothing = [
        through_op([q[:, :, :0], k, v], "qkv"),
        through_op([q, k[:, :, :0], v[:, :, :0]], "q"),
    ]
    assert not any(t.any() for gradients in nothing for t in gradients.values())
    return results[0]


def through_op(inputs, wanted):
    leaves = dict(zip("qkv", (t.detach() for t in inputs), strict=True))
    trained = {name: leaves[name].requires_grad_() for name in wanted}
    y = sk.scaled_dot_product_attention(*leaves.values(), backend="cuda")
    found = torch.autograd.grad(y.sum(), list(trained.values()))  # whose dy has strides of 0
    return dict(zip(trained, found, strict=True))
