"""What inside a model is made in place is what the ops make, and overwrites nothing else."""

import pytest
import torch

import slimkernels as sk
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


def test_gradients_see_the_product():
    torch.manual_seed(0)
    leaves = [torch.randn(n, requires_grad=True) for n in ((6, 5), (8, 5), (8,))]
    x, weight, bias = leaves
    for _ in range(2):
        ours = torch.autograd.grad(gelu_of_product(*leaves, "none").square().sum(), leaves)
    y = sk.gelu(sk.linear(x, weight), bias=bias)
    assert all(map(torch.equal, ours, torch.autograd.grad(y.square().sum(), leaves)))


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
