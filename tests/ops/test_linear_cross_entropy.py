import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, assert_rounding_alone, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.ops.linear_cross_entropy import (
    LINEAR_CROSS_ENTROPY,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_reference,
)
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

BACKENDS = ["triton", "cpu"]
REDUCTIONS = ["none", "mean", "sum"]
SHAPES = [(9, 24, 37), (1, 16, 5), (0, 8, 5), (6, 1, 1)]  # N, C, V
FEATURES = {
    "smoothing": dict(label_smoothing=0.1),
    "z-loss": dict(z_loss=0.01),
    "softcap": dict(softcap=2.0),
    "all": dict(label_smoothing=0.2, z_loss=0.01, softcap=2.0),
}
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(params=["one part", "parts"])
def parts(request, monkeypatch):
    """The rows in one chunk, or in chunks of a few."""
    if request.param == "parts":
        cut(monkeypatch)


def cut(monkeypatch):
    for backend in BACKENDS:
        module = LINEAR_CROSS_ENTROPY.modules[backend]
        if not isinstance(module, str):
            monkeypatch.setattr(module, "CHUNK", 4 * 4 * 37)
            monkeypatch.setattr(module, "SLAB", 100, raising=False)


def inputs_of(shape, dtype, backend, ignored=(1, 4), bias=True):
    torch.manual_seed(0)
    N, C, V = shape
    device = device_of(backend)
    x = torch.randn(N, C, device=device).to(dtype)
    weight = (2 * torch.randn(V, C, device=device) / C**0.5).to(dtype)
    target = torch.randint(V, (N,), device=device)
    for row in ignored:
        target[row : row + 1] = -100
    bias = (torch.randn(V, device=device).to(dtype),) if bias else ()
    return x, weight, target, *bias


def check(backend, inputs, compiled=False, **how):
    skip_unsupported("linear_cross_entropy", backend, *inputs, **how)
    is_plain = "z_loss" not in how and "softcap" not in how

    def ours(*inputs):
        return sk.linear_cross_entropy(*inputs, **how, backend=backend)

    def eager(x, weight, target, *bias):
        logits = F.linear(x, weight.to(x.dtype), *(b.to(x.dtype) for b in bias))
        # In float16 eager's sum over the classes overflows.
        wide = logits.float() if x.dtype == torch.float16 else logits
        if is_plain:
            return F.cross_entropy(wide, target, **how).to(x.dtype)
        return sk.cross_entropy(logits, target, **how, backend="torch")

    def reference(x, weight, target, *bias):
        options = how | {"softcap": how.get("softcap", 0.0)}
        return linear_cross_entropy_reference(x, weight, target, *bias, **options)

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, inputs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@every_reduction
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both_backends
def test_matches_reference(backend, shape, dtype, reduction, bias, parts):
    check(backend, inputs_of(shape, dtype, backend, bias=bias), reduction=reduction)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@every_reduction
@both_backends
def test_features(backend, reduction, features, parts):
    inputs = inputs_of((9, 24, 37), torch.float32, backend)
    check(backend, inputs, reduction=reduction, **features)


@pytest.mark.parametrize("shape", [(70, 40, 300), (130, 72, 65)], ids=str)
@both_backends
def test_several_blocks(backend, shape):
    check(backend, inputs_of(shape, torch.bfloat16, backend), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@every_reduction
@both_backends
def test_float32_parameters_of_narrow_input(backend, reduction, dtype, parts):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, backend)
    check(backend, (x.to(dtype), weight, target, bias), reduction=reduction)


@pytest.mark.parametrize("ignored", [(), range(9)], ids=["none", "all"])
@every_reduction
@both_backends
def test_all_or_no_rows_ignored(backend, reduction, ignored, parts):
    inputs = inputs_of((9, 24, 37), torch.float32, backend, ignored)
    check(backend, inputs, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("ignore_index", [0, -1])
@both_backends
def test_ignore_index(backend, ignore_index):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, backend, ())
    target[2:5] = ignore_index
    check(backend, (x, weight, target, bias), ignore_index=ignore_index)


@every_reduction
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_ignored_rows_are_not_read(backend, reduction, parts):
    x, *others = inputs_of((9, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, x, *others)
    target = others[1]

    def ours(x, weight, bias):
        return sk.linear_cross_entropy(
            x, weight, target, bias, reduction=reduction, backend=backend
        )

    clean = run_with_gradients(ours, (x, others[0], others[2]))
    x[1], x[4] = float("nan"), float("inf")
    poisoned = run_with_gradients(ours, (x, others[0], others[2]))
    for name, expected in clean.items():
        assert torch.equal(poisoned[name], expected), name


@every_reduction
@both_backends
def test_any_layout(backend, reduction):
    x, weight, target, bias = inputs_of((6, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)

    def ours(x, weight, bias, target):
        return sk.linear_cross_entropy(
            x, weight, target, bias, reduction=reduction, backend=backend
        )

    dense = run_with_gradients(ours, (x, weight, bias, target))
    strided = run_with_gradients(
        lambda x, weight, bias: ours(x.t().view(24, 6).t(), weight.t(), bias, target.int()),
        (x, weight.t().contiguous(), bias),
    )
    for name in ("output 0", "gradient 0", "gradient 2"):
        assert torch.equal(dense[name], strided[name]), name
    assert torch.equal(dense["gradient 1"], strided["gradient 1"].t())
    loss = ours(x.view(2, 3, 24), weight, bias, target.view(2, 3))
    assert loss.shape == ((2, 3) if reduction == "none" else ())
    assert torch.equal(loss.flatten(), dense["output 0"].flatten())


@both_backends
def test_tied_weight(backend):
    _, weight, target, bias = inputs_of((9, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, weight, weight, target.new_zeros(37))
    ids = torch.arange(9, device=weight.device)

    def ours(weight, bias):
        return sk.linear_cross_entropy(weight[ids], weight, target, bias, backend=backend)

    def eager(weight, bias):
        return F.cross_entropy(F.linear(weight[ids], weight, bias), target)

    assert_op_matches(ours, eager, eager, (weight, bias))
    everything = torch.arange(37, device=weight.device)

    def with_itself(weight):
        return sk.linear_cross_entropy(weight, weight, everything, backend=backend)

    def eager_with_itself(weight):
        return F.cross_entropy(weight @ weight.t(), everything)

    assert_op_matches(with_itself, eager_with_itself, eager_with_itself, (weight,))


@every_reduction
@both_backends
def test_only_what_needs_a_gradient_gets_one(backend, reduction):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)
    tensors = dict(input=x, weight=weight, bias=bias)

    def gradients(names):
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        loss = sk.linear_cross_entropy(
            **leaves, target=target, reduction=reduction, backend=backend
        )
        loss.backward(torch.ones_like(loss))
        return {n: t.grad for n, t in leaves.items()}

    whole = gradients(tensors)
    for name in tensors:
        alone = gradients([name])
        assert torch.equal(alone.pop(name), whole[name])
        assert all(g is None for g in alone.values())


@every_reduction
@both_backends
def test_a_second_backward_and_no_gradient(backend, reduction):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def ours():
        return sk.linear_cross_entropy(
            x, weight, target, bias, reduction=reduction, backend=backend
        )

    loss = ours()
    dy = torch.full_like(loss, 0.5)
    first = torch.autograd.grad(loss, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, dy)

    def eager(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)

    tensors = [t.detach() for t in leaves]
    baseline, truth = (
        run_with_gradients(eager, [t.to(dtype) for t in tensors], (dy.to(dtype),))
        for dtype in (torch.float32, torch.float64)
    )
    for i, gradients in enumerate(zip(first, second, strict=True)):
        for gradient in gradients:
            assert_no_worse(gradient, baseline[f"gradient {i}"], truth[f"gradient {i}"])
    with torch.no_grad():
        assert torch.equal(ours(), loss)


@every_reduction
@both_backends
def test_compiled_whole(backend, reduction):
    inputs = inputs_of((9, 24, 37), torch.float32, backend)
    check(backend, inputs, compiled=True, reduction=reduction)


@every_reduction
@both_backends
def test_registered_ops(backend, reduction):
    inputs = inputs_of((9, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, *inputs)
    how = dict(reduction=reduction, return_correct=True)
    *tensors_and_numbers, _, _, _ = LINEAR_CROSS_ENTROPY.arguments(*inputs, **how)
    tensors, numbers = tensors_and_numbers[:5], tensors_and_numbers[5:]
    options = reduction, [True, False, True], backend
    args = *tensors, *numbers, True, *options
    torch.library.opcheck(linear_cross_entropy_forward.op, args)
    loss, stats, divisor, *_ = linear_cross_entropy_forward(*args)
    arguments = loss, *tensors, stats, divisor, *numbers, *options
    torch.library.opcheck(linear_cross_entropy_backward.op, arguments)


@both_backends
def test_autocast_multiplies_in_its_dtype_and_returns_float32(backend):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, backend)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)

    def autocast(function):
        def call(*tensors):
            with torch.autocast(x.device.type, torch.bfloat16):
                return function(*tensors)

        return call

    def eager(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target)

    for name in (backend, "torch"):
        ours = autocast(
            lambda x, w, b, name=name: sk.linear_cross_entropy(x, w, target, b, backend=name)
        )
        assert_op_matches(ours, autocast(eager), eager, (x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@both_backends
def test_same_bits_every_time(backend, dtype, monkeypatch):
    cut(monkeypatch)
    x, weight, target, bias = inputs_of((20, 24, 37), dtype, backend)
    skip_unsupported("linear_cross_entropy", backend, x, weight, target)

    def ours(x, weight, bias):
        return sk.linear_cross_entropy(x, weight, target, bias, backend=backend)

    first, second = (run_with_gradients(ours, (x, weight, bias)) for _ in range(2))
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


def test_without_features_logits_are_the_bias():
    x, weight, target, bias = inputs_of((9, 0, 37), torch.float32, "cpu")
    tensors = x, weight, bias

    def eager(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target)

    assert_op_matches(
        lambda x, w, b: sk.linear_cross_entropy(x, w, target, b), eager, eager, tensors
    )
    with pytest.raises(sk.BackendError, match="but input has no features"):
        sk.linear_cross_entropy(x, weight, target, bias, backend="cpu")


def test_the_definition_is_torchs():
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float64, "cpu")
    theirs = F.cross_entropy(F.linear(x, weight, bias), target, label_smoothing=0.1)
    ours = linear_cross_entropy_reference(x, weight, target, bias, label_smoothing=0.1)
    assert_rounding_alone(ours, theirs, terms=37)
    assert_no_worse(
        sk.linear_cross_entropy(x, weight, target, bias, label_smoothing=0.1), theirs, theirs
    )


@every_reduction
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dy", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_reach_ignored_rows(reduction, dy, compiled):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, "cpu")
    x.requires_grad_()
    ours = functools.partial(sk.linear_cross_entropy, reduction=reduction, backend="cpu")
    loss = maybe_compiled(ours, compiled)(x, weight, target, bias)
    (dx,) = torch.autograd.grad(loss, x, torch.full_like(loss, dy))
    ignored = target == -100
    assert ignored.any() and (dx[ignored] == 0).all() and not dx[~ignored].isfinite().any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_gradients_at_once(reduction):
    x, weight, target, bias = inputs_of((9, 24, 37), torch.float32, "cpu")
    x.requires_grad_()
    scales = torch.tensor([1.0, 2.0, -3.0])
    loss = sk.linear_cross_entropy(x, weight, target, bias, reduction=reduction, backend="cpu")
    (together,) = torch.autograd.grad(loss, x, scales, is_grads_batched=True, retain_graph=True)
    (alone,) = torch.autograd.grad(loss, x)
    assert torch.equal(together, alone * scales.view(3, 1, 1))


def test_small_products_are_left_to_eager(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.linear_cross_entropy")
    monkeypatch.setattr(cpu, "MIN_MULTIPLICATIONS", 9 * 24 * 37 + 1)
    inputs = inputs_of((9, 24, 37), torch.float32, "cpu")
    with pytest.raises(sk.BackendError, match="faster below 7993 .*, and this call has 7992"):
        sk.linear_cross_entropy(*inputs, backend="cpu")
    inputs[3].requires_grad_()  # three times the work
    assert "runs on cpu" in sk.explain(sk.linear_cross_entropy, *inputs)
