import pytest
import torch
import torch.nn.functional as F
from op_cases import maybe_compiled

import slimkernels as sk
from slimkernels.ops.linear import LINEAR, linear_backward
from slimkernels.testing import assert_op_matches, run_with_gradients

# Each large enough that the backend does not refuse it; the last has a dx that stays with MKL.
SHAPES = [
    ((130, 257), 129),
    ((2, 65, 300), 128),
    ((4097, 33), 32),
    ((2048,), 2049),
    ((1, 5), 840000),
]
cpu = LINEAR.modules["cpu"]


def inputs_of(shape, N, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    weight = torch.randn(N, shape[-1]).div(shape[-1] ** 0.5).to(dtype)
    return x, weight, torch.randn(N).to(dtype)


@pytest.fixture
def kernel(monkeypatch):
    """The cpu backend on any processor: its numbers must be right where it is not the faster."""
    if isinstance(cpu, str):
        pytest.skip(cpu)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu, "_IS_AMD", True)
    monkeypatch.setattr(cpu, "_HAS_BOTH", True)


def on_cpu(x, weight, bias=None):
    return sk.linear(x, weight, bias, backend="cpu")


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape, N", SHAPES, ids=str)
def test_matches_reference(kernel, shape, N, has_bias, compiled):
    inputs = inputs_of(shape, N)[: 2 + has_bias]
    assert_op_matches(maybe_compiled(on_cpu, compiled), F.linear, F.linear, inputs)


def test_dx_of_very_many_dy_is_the_same(kernel, monkeypatch):
    inputs = inputs_of((130, 257), 129)
    monkeypatch.setattr(cpu, "MAX_DY", 1000)
    assert_op_matches(on_cpu, F.linear, F.linear, inputs)


def test_non_contiguous_input_weight_and_gradient(kernel):
    x, weight, bias = inputs_of((70, 3, 200), 128)
    strided_weight = weight.t().contiguous().t()

    def strided(x, weight, bias):
        return on_cpu(x.transpose(0, 1), weight, bias).transpose(0, 1)

    assert_op_matches(strided, F.linear, F.linear, (x, strided_weight, bias))


@pytest.mark.parametrize("frozen", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}], ids=str)
def test_only_the_gradients_that_are_wanted(kernel, frozen):
    inputs = inputs_of((130, 257), 129)
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate(inputs)]
    on_cpu(*leaves).square().sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) == (i in frozen)
        if leaf.grad is not None:
            assert leaf.grad.shape == leaf.shape
    wanted = [i not in frozen for i in range(3)]
    dy = torch.randn(130, 129)
    for gradient, leaf, is_wanted in zip(
        linear_backward(dy, *inputs[:2], wanted, "cpu"), inputs, wanted, strict=True
    ):
        assert gradient.numel() == (leaf.numel() if is_wanted else 0)


def test_same_bits_every_time(kernel):
    inputs = inputs_of((130, 257), 129)
    first, second = run_with_gradients(on_cpu, inputs), run_with_gradients(on_cpu, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_is_torchs(kernel, compiled):
    x, weight, bias = inputs_of((130, 257), 129)
    call = maybe_compiled(lambda x: sk.linear(x, weight, bias.bfloat16()), compiled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = call(x), F.linear(x, weight, bias.bfloat16())
        with pytest.raises(sk.BackendError, match="under autocast torch's own linear"):
            on_cpu(x, weight)
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_torchs(kernel, dtype):
    inputs = inputs_of((130, 257), 129, dtype)
    assert torch.equal(sk.linear(*inputs), F.linear(*inputs))
    with pytest.raises(sk.BackendError, match=f"it is for float32 .* input is {dtype}"):
        on_cpu(*inputs)


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (2, 3, 5)], ids=str)
def test_small_products_are_torchs(kernel, shape, monkeypatch):
    monkeypatch.setattr(cpu, "MIN_PRODUCT", 1000)
    x, weight, bias = inputs_of(shape, 4)
    assert torch.equal(sk.linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(sk.BackendError, match="fewer than 1000 multiplications"):
        on_cpu(x, weight, bias)


@pytest.mark.parametrize(
    "name, sentence", [("_IS_AMD", "on AMD processors only"), ("_HAS_BOTH", "both MKL and oneDNN")]
)
def test_refuses_where_it_is_not_known_to_be_faster(kernel, monkeypatch, name, sentence):
    monkeypatch.setattr(cpu, name, False)
    with pytest.raises(sk.BackendError, match=sentence):
        on_cpu(*inputs_of((130, 257), 129))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_gpu_backends_leave_the_product_to_torch(backend):
    with pytest.raises(sk.BackendError, match="torch's own matrix product is the fastest known"):
        sk.linear(*inputs_of((3, 4), 5), backend=backend)


X, W, B = torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)


@pytest.mark.parametrize(
    "args, sentence",
    [
        (([1.0], W), "input must be a tensor; got list"),
        ((X.int(), W), "input must be float32, float16, bfloat16 or float64; got torch.int32"),
        ((X[0, 0], W), r"input must have a last dimension; got shape \(\)"),
        ((X, W.t()), r"weight must have shape \(N, 8\), the last .*\(4, 8\); got \(8, 3\)"),
        ((X, W[0]), r"weight must have shape \(N, 8\), the last .*; got \(8,\)"),
        ((X, W, B[:2]), r"bias must have shape \(3,\), the rows of weight \(3, 8\); got \(2,\)"),
        ((X, W.double()), "weight must be torch.float32 like input; got torch.float64"),
        ((X, W, B.half()), "bias must be torch.float32 like input; got torch.float16"),
        ((X, W.to("meta")), "weight must be on cpu like input; got meta"),
    ],
)
@pytest.mark.parametrize("backend", [None, "cpu", "torch"])
def test_bad_input_is_one_sentence(backend, args, sentence):
    with pytest.raises(ValueError, match="^linear: " + sentence):
        sk.linear(*args, backend=backend)
