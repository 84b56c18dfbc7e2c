"""Calls that are known to be torch's own give what they gave at first, and no other is known."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops import _call_memory, _known_calls

pytest.importorskip("slimkernels._cpu", reason="nothing is kept without the extension")

x, y = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6, 8)
w, b = torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)
v = torch.linspace(0.5, 2, 6)
gaps = torch.stack([x, x], -1)[..., 0]

# op: (what is remembered, what differs from it by as little as can be)
CALLS = {
    "layer_norm": (
        lambda: sk.layer_norm(x, 8, w, b),
        [
            lambda: sk.layer_norm(x, 8, w, b, 1e-2),
            lambda: sk.layer_norm(x, 8, w, b, zero_centered=True),
            lambda: sk.layer_norm(x, 8, w),
            lambda: sk.layer_norm(x.bfloat16(), 8, w, b),
            lambda: sk.layer_norm(gaps, 8, w, b),
        ],
    ),
    "add_layer_norm": (
        lambda: sk.add_layer_norm(x, y, 8, w, b)[0],
        [
            lambda: sk.add_layer_norm(x, y, 8, w, b, zero_centered=True)[0],
            lambda: sk.add_layer_norm(x, y, 8, w, b, row_scale=torch.zeros(2, 1))[0],
            lambda: sk.add_layer_norm(x.bfloat16(), y, 8, w, b)[0],
        ],
    ),
    "rms_norm": (
        lambda: sk.rms_norm(x, 8, w),
        [
            lambda: sk.rms_norm(x, 8, w, 1e-2),
            lambda: sk.rms_norm(x, (6, 8), y[0] * v[:, None]),
            lambda: sk.rms_norm(x.bfloat16(), 8, w),
            lambda: sk.rms_norm(x, 8, w, zero_centered=True),
            lambda: sk.rms_norm(gaps, 8, w),
        ],
    ),
    "add_rms_norm": (
        lambda: sk.add_rms_norm(x, y, 8, w)[0],
        [
            lambda: sk.add_rms_norm(x, y, 8, w)[1],
            lambda: sk.add_rms_norm(x, y, 8, w, 1e-2)[0],
            lambda: sk.add_rms_norm(x, y, 8)[0],
            lambda: sk.add_rms_norm(x.bfloat16(), y, 8, w)[0],
        ],
    ),
    "group_norm": (
        lambda: sk.group_norm(x, 3, v, v),
        [
            lambda: sk.group_norm(x, 2, v, v),
            lambda: sk.group_norm(x, 3, v),
            lambda: sk.group_norm(x, 3, None, v),
        ],
    ),
    "log_softmax": (
        lambda: sk.log_softmax(x, 1),
        [
            lambda: sk.log_softmax(x, 2),
            lambda: sk.log_softmax(x, 1, scale=2.0),
            lambda: sk.log_softmax(x, 1, dtype=torch.float64),
            lambda: sk.log_softmax(x, 1, is_causal=False, mask=torch.zeros(8)),
            lambda: sk.log_softmax(x, 2, is_causal=True),
            lambda: sk.log_softmax(gaps.mT.contiguous().mT, 1),
        ],
    ),
    "bias_dropout_add": (
        lambda: sk.bias_dropout_add(x, b, y),
        [
            lambda: sk.bias_dropout_add(x, b),
            lambda: sk.bias_dropout_add(x, None, y),
            lambda: sk.bias_dropout_add(x.bfloat16(), b, y.bfloat16()),
            lambda: sk.bias_dropout_add(gaps, b, y),
        ],
    ),
    "linear": (
        lambda: sk.linear(x, y[0]),
        [lambda: sk.linear(x, y[0], v), lambda: sk.linear(x.double(), y[0].double())],
    ),
}


@pytest.fixture(autouse=True)
def small_calls_are_torchs(monkeypatch, run_kernels_where_eager_is_faster):
    for op in CALLS:
        module = OPS[op].modules["cpu"]
        for name in () if isinstance(module, str) else vars(module):
            if name.startswith("MIN_"):
                monkeypatch.setattr(module, name, 1 << 40)
    yield
    _known_calls.forget()


@pytest.mark.parametrize("op", CALLS)
def test_known_and_unknown_calls(op):
    first, others = CALLS[op]
    expected = []
    for call in (first, *others):
        expected.append(call())
        _known_calls.forget()
    assert torch.equal(first(), expected[0])
    assert len(_known_calls._known) == 1
    assert torch.equal(first(), expected[0])
    for other, result in zip(others, expected[1:], strict=True):
        again = other()
        assert again.dtype == result.dtype and again.is_contiguous()
        assert torch.equal(again, result)


def test_an_order_a_mode_and_a_transform_are_looked_at_again():
    def norm(x):
        return sk.layer_norm(x, 8, w, b)

    # It takes the definition, whatever is faster. Anew: as where none has been seen before.
    _call_memory.recognize_torch(Tensor, Parameter, torch.Size, _call_memory.is_transformed)
    torch.vmap(lambda shift: norm(x) + shift)(y)
    torch.vmap(norm)(torch.stack([x, x]))
    assert not _known_calls._known
    with sk.use_backend("torch"):
        norm(x)
    assert not _known_calls._known
    norm(x)
    assert len(_known_calls._known) == 1
    with sk.use_backend("cpu"), pytest.raises(sk.BackendError):
        norm(x)


def test_what_is_wrong_is_refused_after_what_was_right():
    for row in (8, (8,), [8], w.shape):
        sk.layer_norm(x, row, w, b)
    assert len(_known_calls._known) == 3
    for wrong in (
        lambda: sk.layer_norm(x, 8, w, b, zero_centered=0),
        lambda: sk.layer_norm(x, 8.0, w, b),
        lambda: sk.layer_norm(x, (8.0,), w, b),
        lambda: sk.layer_norm(x, [8.0], w, b),
        lambda: sk.layer_norm(x.to_sparse(), 8, w, b),
        lambda: sk.layer_norm(x, 8, w.to("meta"), b),
    ):
        with pytest.raises(ValueError, match="layer_norm: "):
            wrong()
    sk.log_softmax(x, 1)
    with pytest.raises(ValueError, match="log_softmax: dim"):
        sk.log_softmax(x, True)


def test_gradients_of_a_known_call():
    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return torch.autograd.grad(sk.layer_norm(leaves[0], 8, *leaves[1:]), leaves, dy)

    first = gradients()
    assert len(_known_calls._known) == 1
    assert all(map(torch.equal, first, gradients()))


def test_autocast_is_looked_at_again():
    call = (x, w, b), ("layer_norm", 8, 1e-5, False, None)
    sk.layer_norm(x, 8, w, b)
    assert _known_calls.chosen_before(call) == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert _known_calls.chosen_before(call) is None
        sk.linear(x, y[0])
        assert len(_known_calls._known) == 1
    assert _known_calls.chosen_before(call) == "torch"


def test_transforms_and_tangents_go_through_a_known_call():
    def norm(x):
        return sk.layer_norm(x, 8, w, b)

    def torchs(x):
        return torch.layer_norm(x, (8,), w, b)

    def results_of(norm):
        primal, tangent = torch.func.jvp(norm, (x,), (y,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, y)))
        gradient = torch.func.grad(lambda x: norm(x).square().sum())(x)
        return primal, tangent, *dual, gradient, torch.vmap(norm)(torch.stack([x, y]))

    results_of(norm)
    assert len(_known_calls._known) == 0
    norm(x)
    for ours, expected in zip(results_of(norm), results_of(torchs), strict=True):
        assert torch.equal(ours, expected)


def test_known_calls_compile_and_trace():
    def both(x):
        return sk.layer_norm(x, 8, w, b), sk.scaled_dot_product_attention(x, x, x, scale=0.5)

    q = x[None]
    expected = both(q)
    assert len(_known_calls._known) == 1
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="eager")(q)
    assert all(map(torch.equal, compiled, expected))
    traced = torch.jit.trace(lambda x: sk.layer_norm(x, 8, w, b), q)
    assert torch.equal(traced(q + 1), sk.layer_norm(q + 1, 8, w, b))


def test_who_watches_choices_sees_every_one():
    call = (x, w, b), ("layer_norm", 8, 1e-5, False, None)
    for _ in range(2):
        sk.layer_norm(x, 8, w, b)
        assert _known_calls.chosen_before(call) == "torch"
        with _known_calls.nothing_known():
            sk.layer_norm(x, 8, w, b)
            assert _known_calls.chosen_before(call) is None


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_rows_of_two_dimensions_are_not_known(op):
    """Of rows that lie apart torch makes other bits than of the copy that the checks make."""
    x = torch.randn(4, 24, 16, generator=torch.Generator().manual_seed(0)).mT
    args = (x, x + 1) if op.startswith("add") else (x,)
    getattr(sk, op)(*args, (16, 24), torch.ones(16, 24))
    assert not _known_calls._known
