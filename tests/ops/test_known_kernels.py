"""Calls whose kernel is known give what they gave at first, and no other call is taken for one."""

import pytest
import torch

import slimkernels as sk
from slimkernels.ops import _known_calls

pytest.importorskip("slimkernels._cpu", reason="nothing is kept without the extension")

generator = torch.Generator().manual_seed(0)
x, y = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
w, b = torch.linspace(0.5, 2, 16), torch.linspace(-1, 1, 16)
gaps = torch.stack([x, y], -1)[..., 0]
minus = torch.complex(y, -x).conj().imag  # x, whose sign is still to be changed

# op: (what is remembered, what differs from it by as little as can be, what is refused)
CALLS = {
    "gelu": (
        lambda x: sk.gelu(x, bias=b),
        [lambda: sk.gelu(x, bias=b, approximate="tanh"), lambda: sk.gelu(x, bias=w)],
        [lambda: sk.gelu(x, bias=b, approximate=None), lambda: sk.gelu(x, bias=b[1:])],
    ),
    "silu": (
        lambda x: sk.silu(x, bias=b),
        [lambda: sk.silu(x), lambda: sk.relu_squared(x, bias=b)],
        [lambda: sk.silu(x.to_sparse(), bias=b), lambda: sk.silu(x, bias=b.tolist())],
    ),
    "geglu": (
        lambda x: sk.geglu(x),
        [
            lambda: sk.geglu(x, gate=y),
            lambda: sk.geglu(x, approximate="tanh"),
            lambda: sk.swiglu(x),
        ],
        [lambda: sk.geglu(x[..., 1:]), lambda: sk.geglu(x, gate=w)],
    ),
    "layer_norm": (
        lambda x: sk.layer_norm(x, 16, w, b),
        [
            lambda: sk.layer_norm(x, 16, w, b, zero_centered=True),
            lambda: sk.layer_norm(x, (5, 16)),
            lambda: sk.layer_norm(x.bfloat16(), 16, w.bfloat16(), b.bfloat16()),
        ],
        [lambda: sk.layer_norm(x, 16, w, b, 1j), lambda: sk.layer_norm(x, 16, w, b, True)],
    ),
    "rms_norm": (
        lambda x: sk.rms_norm(x, 16, w),
        [lambda: sk.rms_norm(x, 16), lambda: sk.rms_norm(x, 16, w, 1e-2)],
        [lambda: sk.rms_norm(x, 15, w), lambda: sk.rms_norm(x, 16, w, zero_centered=0)],
    ),
    "add_layer_norm": (
        lambda x: sk.add_layer_norm(x, y, 16, w, b)[0],
        [
            lambda: sk.add_layer_norm(x, y, 16, w, b, row_scale=torch.zeros(3, 1))[0],
            lambda: sk.add_layer_norm(x.bfloat16(), y, 16, w, b)[1],
        ],
        [lambda: sk.add_layer_norm(x, y, 16, w, b, dropout_p=2)],
    ),
    "add_rms_norm": (
        lambda x: sk.add_rms_norm(x, y, 16, w)[0],
        [lambda: sk.add_rms_norm(x, y, 16, w)[1], lambda: sk.add_rms_norm(x, y, 16, w, 1e-2)[0]],
        [lambda: sk.add_rms_norm(x, y[1:], 16, w)],
    ),
}


@pytest.fixture(autouse=True)
def forgotten(run_kernels_where_eager_is_faster):
    _known_calls.forget()
    yield
    _known_calls.forget()


@pytest.mark.parametrize("op", CALLS)
def test_known_and_unknown_calls(op):
    first, others, wrong = CALLS[op]
    expected = [first(x)]
    for call in others:
        _known_calls.forget()
        expected.append(call())
    _known_calls.forget()
    first(x)
    assert len(_known_calls._known) == 1
    for given in (x, gaps, minus):
        assert torch.equal(first(given), expected[0])
    assert len(_known_calls._known) == 1
    for call, result in zip(others, expected[1:], strict=True):
        for _ in range(2):
            again = call()
            assert again.dtype == result.dtype and torch.equal(again, result)
    for call in wrong:
        with pytest.raises(ValueError, match=f"{op}: "):
            call()


@pytest.mark.parametrize("op", CALLS)
def test_gradients_transforms_and_orders(op):
    function = CALLS[op][0]
    dy = torch.randn(function(x).shape, generator=torch.Generator().manual_seed(1))

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf, dy)[0]

    known = gradient()
    _known_calls.forget()
    assert torch.equal(known, gradient())
    with sk.use_backend("torch"):
        expected, slope = function(x), gradient()
    function(x)
    torch.testing.assert_close(torch.func.vmap(function)(x[None])[0], expected)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](dy)[0], slope)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), function(x))


def test_who_changes_calls_is_asked_first():
    call = (x, b), ("gelu", "gelu", None)
    seen = []

    def look(t):
        seen.append(_known_calls.chosen_before(call))
        return t

    sk.gelu(x, bias=b)
    look(x)
    torch.func.vmap(look)(x)  # around tensors that take no part in it
    with torch.autocast("cpu", torch.bfloat16):
        look(x)
    with sk.use_backend("triton"):
        look(x)
    assert seen == ["cpu", None, None, None]


def test_no_kernel_reads_what_has_no_memory():
    zeros = torch._efficientzerotensor((3, 5, 16))
    expected = sk.gelu(torch.zeros(3, 5, 16), bias=b)  # known from here on
    assert torch.equal(sk.gelu(zeros, bias=b), expected)


def test_a_layout_that_the_kernel_refuses_does_not_decide_for_others():
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    v = torch.linspace(0.5, 2, 4)
    first = sk.group_norm(x, 2, v, v)
    sk.group_norm(x.to(memory_format=torch.channels_last), 2, v, v)
    assert _known_calls.chosen_before(((x, v, v), ("group_norm", 2, 1e-5, None))) is None
    assert torch.equal(sk.group_norm(x, 2, v, v), first)
