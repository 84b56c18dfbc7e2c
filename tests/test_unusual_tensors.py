"""Calls that no kernel may take as they stand: tensors that are no plain memory, and transforms."""

import pytest
import torch

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.testing import assert_no_worse

X = torch.randn(4, 8)
W = torch.ones(8)


def plain(x, w):
    return sk.layer_norm(x, 8, w)


def test_fake_tensors_and_tracers_see_the_registered_op():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode():
        assert plain(torch.empty(4, 8), torch.empty(8)).shape == (4, 8)
    graph = make_fx(plain)(X, W)
    assert torch.equal(graph(X + 1, W), plain(X + 1, W))
    assert any("layer_norm" in str(node.target) for node in graph.graph.nodes)


def test_a_lazy_negation_is_carried_out():
    for x, w in ((torch._neg_view(X), W), (X, torch._neg_view(W + 1))):
        assert torch.equal(plain(x, w), plain(x.resolve_neg(), w.resolve_neg()))


def test_a_subclass_that_holds_no_memory_is_never_read():
    class Empty(torch.Tensor):
        @staticmethod
        def __new__(cls, like):
            return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise NotImplementedError(f"no {function}")

    with pytest.raises((TypeError, NotImplementedError)):
        plain(Empty(X), W)
    with pytest.raises((TypeError, NotImplementedError)):
        plain(X, Empty(W))


def test_forward_mode_differentiation_is_refused_not_lost():
    import torch.autograd.forward_ad as forward_ad

    if OPS["layer_norm"].select(X, W, None, 1e-5, False) == "torch":
        pytest.skip("no kernel runs here")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(NotImplementedError):
            plain(dual, W)
        with sk.use_backend("torch"):
            assert forward_ad.unpack_dual(plain(dual, W)).tangent is not None


def test_one_tensor_given_twice_compiles():
    torch._dynamo.reset()
    w = torch.randn(8, requires_grad=True)
    compiled = torch.compile(
        lambda x: sk.layer_norm(x, 8, w, w), fullgraph=True, backend="aot_eager"
    )
    compiled(X).sum().backward()
    gradient, w.grad = w.grad, None
    sk.layer_norm(X, 8, w, w).sum().backward()
    assert torch.equal(gradient, w.grad)


def test_transforms_of_torch_func_take_the_definition():
    pytest.importorskip("slimkernels._cpu")
    x, dy = torch.randn(2, 700, 384).unbind()
    weight = torch.randn(2, 384, requires_grad=True)
    each = torch.vmap(lambda w: sk.rms_norm(x, 384, w))(weight)
    (actual,) = torch.autograd.grad(each, weight, torch.stack((dy, dy)))

    def gradient_of(x, weight, dy):
        y = sk.rms_norm(x, 384, weight, backend="torch")
        return torch.autograd.grad(y, weight, dy)[0]

    for i in range(2):
        eager = gradient_of(x, weight[i], dy)
        truth = gradient_of(x.double(), weight[i].double(), dy.double())
        assert_no_worse(actual[i], eager, truth)


def test_vectorised_gradients_of_a_kernel_are_refused():
    pytest.importorskip("slimkernels._cpu")
    x = torch.randn(3, 6)
    hidden = torch.zeros(6, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="softmax: a kernel's gradient cannot be vectorised"):
        torch.autograd.functional.jacobian(
            lambda x: sk.softmax(x, mask=hidden, backend="cpu"), x, vectorize=True
        )
