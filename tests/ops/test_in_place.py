"""What inside a model is made in place is what the ops make, and overwrites nothing else."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops.add_layer_norm import post_norm
from slimkernels.ops.gelu import gelu_of_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_product_alone_is_overwritten(approximate, dtype):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(n, dtype=dtype) for n in ((6, 5), (8, 5), (8,)))
    given = [t.clone() for t in (x, weight, bias)]
    expected = sk.gelu(sk.linear(x, weight), bias=bias, approximate=approximate)
    for _ in range(3):  # from the second on the kernel is known
        assert torch.equal(gelu_of_product(x, weight, bias, approximate), expected)
    assert all(map(torch.equal, given, (x, weight, bias)))
    without = sk.gelu(sk.linear(x, weight), approximate=approximate)
    assert torch.equal(gelu_of_product(x, weight, None, approximate), without)


@pytest.fixture
def in_place(monkeypatch, run_kernels_where_eager_is_faster):
    """The names of the kernels that ran in place."""
    pytest.importorskip("slimkernels._cpu", reason="nothing is known without the extension")
    ran = []
    for op, name in (("gelu", "forward_in_place"), ("add_layer_norm", "forward_alone")):
        module = OPS[op].modules["cpu"]
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, k=kernel, n=name: ran.append(n) or k(*a))
    return ran


def _calls():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(n) for n in ((6, 8), (8, 8), (8,)))

    def product(x, weight, bias):
        return gelu_of_product(x, weight, bias, "none")

    def norm(x, residual, weight, bias):
        return post_norm(x, residual, (8,), weight, bias, 1e-5, dropout_p=0.0)

    return (product, (x, weight, bias)), (norm, (x, x + 1, weight[0], bias))


class Keeping(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and function is torch.nn.functional.linear:
            self.seen.append((result, result.clone()))
        return result


def test_who_is_in_place(in_place):
    for function, given in _calls():
        expected = [function(*given) for _ in range(2)][0]
        assert len(in_place) == 1
        for i in range(len(given)):  # one gradient is enough to be asked first
            leaves = [t.clone().requires_grad_(n == i) for n, t in enumerate(given)]
            y = function(*leaves)
            assert torch.equal(y, expected)
            y.square().sum().backward()
            assert leaves[i].grad.abs().sum() > 0
        with torch.autocast("cpu", torch.bfloat16):
            function(*given)
        vmapped = torch.func.vmap(function, (0, *[None] * (len(given) - 1)))(
            given[0][None], *given[1:]
        )
        torch.testing.assert_close(vmapped[0], expected)
        assert len(in_place) == 1
        assert torch.equal(function(*given), expected)
        assert len(in_place) == 2
        in_place.clear()


def test_who_keeps_a_product_has_it(in_place):
    (function, given), _ = _calls()
    function(*given)
    with Keeping() as mode:
        function(*given)
    assert mode.seen and all(torch.equal(*pair) for pair in mode.seen)


def test_a_wrong_approximation_is_told_of_before_the_product():
    (_, given), _ = _calls()
    with pytest.raises(ValueError, match="gelu: approximate must be"):
        gelu_of_product(*given, "fast")


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_sum_alone_is_overwritten(run_kernels_where_eager_is_faster, dropout_p, dtypes):
    torch.manual_seed(0)
    x, residual, weight, bias = (torch.randn(n) for n in ((3, 7, 20), (3, 7, 20), 20, 20))
    x, residual = x.to(dtypes[0]), residual.to(dtypes[1])
    tensors = [x, residual.mT.contiguous().mT, weight, bias]
    given = [t.clone() for t in tensors]

    def call(op, tensors):
        torch.manual_seed(1)
        x, residual, *parameters = tensors
        return op(x, residual, (20,), *parameters, 1e-5, dropout_p=dropout_p)

    expected, _ = call(sk.add_layer_norm, tensors)
    for _ in range(2):
        assert torch.equal(call(post_norm, tensors), expected)
    assert all(map(torch.equal, given, tensors))
    gradients = []
    for op in (lambda *args, **o: sk.add_layer_norm(*args, **o)[0], post_norm):
        leaves = [t.clone().requires_grad_() for t in tensors]
        gradients.append(torch.autograd.grad(call(op, leaves).square().sum(), leaves))
    assert all(map(torch.equal, *gradients))
