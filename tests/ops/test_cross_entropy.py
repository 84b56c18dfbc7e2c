import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
)

import slimkernels as sk
from slimkernels.ops.cross_entropy import (
    CROSS_ENTROPY,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_reference,
)
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

SHAPES = [(1, 1), (3, 7), (9, 1), (11, 130), (2, 9001), (0, 5)]
REDUCTIONS = ["none", "mean", "sum"]
SMOOTHING = [0.0, 0.1, 1.0]


def inputs_of(shape, dtype, device, spread=1.0, ignored=(1, 2)):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).mul(spread).to(dtype)
    target = torch.randint(shape[1], shape[:1] + shape[2:], device=device)
    for row in ignored:
        if row < shape[0]:
            target[row] = -100
    return x, target


def check(backend, inputs, reduction, label_smoothing, compiled=False, ignore_index=-100):
    how = dict(ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    skip_unsupported("cross_entropy", backend, *inputs, **how)

    def ours(x, target):
        return sk.cross_entropy(x, target, **how, backend=backend)

    def eager(x, target):
        # In float16 eager's sum over the classes overflows, so there it computes in float32.
        wide = x.float() if x.dtype == torch.float16 else x
        return F.cross_entropy(wide, target.long(), **how).to(x.dtype)

    def reference(x, target):
        x = x.movedim(1, -1).reshape(-1, x.shape[1])
        loss, _ = cross_entropy_reference(
            x, target.long().flatten(), None, ignore_index, reduction, label_smoothing
        )
        return loss.view(target.shape) if reduction == "none" else loss

    assert_op_matches(maybe_compiled(ours, compiled), eager, reference, inputs)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("label_smoothing", SMOOTHING)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, shape, dtype, reduction, label_smoothing, compiled):
    if compiled and (shape[1] > 1000 or label_smoothing == 1.0):
        pytest.skip("one compiled call of each kind is enough")
    check(
        backend, inputs_of(shape, dtype, device_of(backend)), reduction, label_smoothing, compiled
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_many_rows(backend, reduction, monkeypatch):
    kernels = CROSS_ENTROPY.modules[backend]
    if hasattr(kernels, "SUMMED"):  # many for smaller blocks: the interpreter is slow
        monkeypatch.setattr(kernels, "ROWS", 32)
        monkeypatch.setattr("slimkernels.backends.triton._cross_entropy.SUMMED", 16)
    check(backend, inputs_of((75, 6), torch.float32, device_of(backend)), reduction, 0.1)


@pytest.mark.parametrize("label_smoothing", SMOOTHING)
@pytest.mark.parametrize("spread", [10.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_large_logits(backend, dtype, spread, label_smoothing):
    inputs = inputs_of((12, 70), dtype, device_of(backend), spread)
    check(backend, inputs, "none", label_smoothing)


# Two competing logits near 1e4: an lse kept in one float32 makes p wrong by 5e-4.
@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("label_smoothing", SMOOTHING)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_large_logits_that_differ_little(backend, offset, label_smoothing):
    x, target = inputs_of((12, 70), torch.float32, device_of(backend))
    check(backend, (x + offset, target), "none", label_smoothing)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", ["none", "all"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_all_or_no_rows_ignored(backend, ignored, reduction, label_smoothing):
    rows = range(6) if ignored == "all" else ()
    inputs = inputs_of((6, 9), torch.float32, device_of(backend), ignored=rows)
    check(backend, inputs, reduction, label_smoothing)


@pytest.mark.parametrize("ignore_index", [0, 3, -1])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_ignore_index(backend, ignore_index):
    x, target = inputs_of((8, 5), torch.float32, device_of(backend), ignored=())
    target[2:4] = ignore_index
    check(backend, (x, target), "mean", 0.1, ignore_index=ignore_index)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_int32_target(backend):
    x, target = inputs_of((8, 5), torch.float32, device_of(backend))
    check(backend, (x, target.int()), "mean", 0.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_classes_in_the_second_dimension(backend, shape, reduction):
    inputs = inputs_of(shape, torch.float32, device_of(backend), ignored=(1,))
    check(backend, inputs, reduction, 0.1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_one_row_without_a_batch(backend, reduction):
    x, target = inputs_of((1, 7), torch.float32, device_of(backend), ignored=())
    skip_unsupported("cross_entropy", backend, x, target)
    loss = sk.cross_entropy(x[0], target[0], reduction=reduction, backend=backend)
    assert loss.shape == ()
    eager, truth = (F.cross_entropy(t[0], target[0], reduction=reduction) for t in (x, x.double()))
    assert_no_worse(loss, eager, truth)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("V", [20, 9001])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_logits_that_are_not_finite(backend, V, label_smoothing):
    x, target = inputs_of((7, V), torch.float32, device_of(backend), ignored=())
    target[:] = 3
    inf = float("inf")
    x[0, 5] = float("nan")
    x[1, 5] = inf
    x[2, 5] = -inf
    x[3, 3] = -inf
    x[4] = -inf
    x[5, : V - 1] = -inf  # whole parts of the row
    skip_unsupported("cross_entropy", backend, x, target)
    how = dict(reduction="none", label_smoothing=label_smoothing)

    ours = run_with_gradients(lambda x: sk.cross_entropy(x, target, **how, backend=backend), (x,))
    eager, truth = (
        run_with_gradients(lambda x: F.cross_entropy(x, target, **how), (t,))
        for t in (x, x.double())
    )
    for name, expected in truth.items():
        assert_no_worse(ours[name], eager[name], expected, what=name)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_autocast_gives_a_float32_loss_as_in_torch(backend, reduction):
    x, target = inputs_of((6, 9), torch.bfloat16, device_of(backend))
    skip_unsupported("cross_entropy", backend, x, target)

    def autocast(function, **options):
        def call(x):
            with torch.autocast(x.device.type, torch.bfloat16):
                return function(x, target, reduction=reduction, **options)

        return call

    ours, eager = autocast(sk.cross_entropy, backend=backend), autocast(F.cross_entropy)
    assert ours(x).dtype == eager(x).dtype == torch.float32
    if backend == "torch":
        assert ours(x.double()).dtype == torch.float64
    assert sk.cross_entropy(x, target, backend=backend).dtype == torch.bfloat16
    for function in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True)):
        assert_op_matches(function, eager, eager, (x,))


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_ignored_rows_are_not_read(backend):
    x, target = inputs_of((6, 9), torch.float32, device_of(backend), ignored=())
    skip_unsupported("cross_entropy", backend, x, target)
    clean = run_with_gradients(
        lambda x: sk.cross_entropy(x[[0, 2, 3, 5]], target[[0, 2, 3, 5]], backend=backend), (x,)
    )
    target[1], target[4] = -100, -100
    x[1], x[4] = float("nan"), float("inf")
    poisoned = run_with_gradients(lambda x: sk.cross_entropy(x, target, backend=backend), (x,))
    for name, expected in clean.items():
        assert torch.equal(poisoned[name], expected), name


# Called below the checks: what a GPU or compiled code does, where no one may look at the labels.
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("weight", [None, torch.ones(9)], ids=["", "weighted"])
def test_label_out_of_range_gives_nan_in_its_row(weight, backend, reduction):
    x, target = inputs_of((5, 9), torch.float32, device_of(backend))
    skip_unsupported("cross_entropy", backend, x, target)
    target[0], target[4] = 9, -7
    how = -100, reduction, 0.1, 0.1, 0.0
    loss, *saved, correct = cross_entropy_forward(x, target, weight, *how, True, backend)
    dy = torch.ones_like(loss)
    dx = cross_entropy_backward(dy, None, x, target, weight, *saved, *how, backend)
    assert not correct[[0, 4]].any()
    assert loss[[0, 4]].isnan().all() if reduction == "none" else loss.isnan()
    assert dx[[0, 4]].isnan().all() and dx[1:4].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_non_contiguous_input_and_gradient(backend, reduction):
    x, target = inputs_of((6, 40), torch.float32, device_of(backend))
    skip_unsupported("cross_entropy", backend, x, target)
    dense = run_with_gradients(
        lambda x: sk.cross_entropy(x, target, reduction=reduction, backend=backend), (x,)
    )
    column = target.repeat(2, 1).t()[:, 0]
    strided = run_with_gradients(
        lambda x: sk.cross_entropy(x.t(), column, reduction=reduction, backend=backend),
        (x.t().contiguous(),),
    )
    assert torch.equal(strided["output 0"], dense["output 0"])
    assert torch.equal(strided["gradient 0"].t(), dense["gradient 0"])
    # sum() sends back one element, expanded.
    leaf = x.clone().requires_grad_()
    losses = sk.cross_entropy(leaf, target, reduction="none", backend=backend)
    expanded = torch.autograd.grad(losses.sum(), leaf)[0]
    total = sk.cross_entropy(leaf, target, reduction="sum", backend=backend)
    assert torch.equal(expanded, torch.autograd.grad(total, leaf)[0])


@pytest.mark.parametrize("shape", [(20, 65), (2, 9001)], ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend, shape):
    inputs = inputs_of(shape, torch.float32, device_of(backend), ignored=(1,))
    skip_unsupported("cross_entropy", backend, *inputs)

    def ours(x, target):
        return sk.cross_entropy(x, target, label_smoothing=0.1, backend=backend)

    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_every_instruction_set_and_number_of_threads(each_isa, dtype, label_smoothing):
    threads = torch.get_num_threads()
    for shape in [(3, 30011), (700, 97)]:
        inputs = inputs_of(shape, dtype, "cpu", 3.0)
        for isa in each_isa():
            check("cpu", inputs, "mean", label_smoothing)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(
                    run_with_gradients(
                        lambda x, target: sk.cross_entropy(
                            x, target, label_smoothing=label_smoothing, backend="cpu"
                        ),
                        inputs,
                    )
                )
            torch.set_num_threads(threads)
            for name, expected in results[0].items():
                assert torch.equal(results[1][name], expected), (isa, name)


@pytest.mark.parametrize("label_smoothing", SMOOTHING)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_definition_is_torchs(reduction, label_smoothing):
    x, target = inputs_of((4, 5), torch.float64, "cpu")
    how = dict(reduction=reduction, label_smoothing=label_smoothing)
    ours, _ = cross_entropy_reference(x, target, None, -100, reduction, label_smoothing)
    theirs = F.cross_entropy(x, target, **how)
    assert_rounding_alone(ours, theirs, terms=5)
    assert torch.equal(sk.cross_entropy(x, target, **how), theirs)


X, T = torch.randn(4, 8), torch.tensor([0, 7, -100, 3])


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(input=[1.0]), "input must be a tensor; got list"),
        (dict(input=X.int()), "input must be float32, float16, bfloat16 or float64; got torch.int"),
        (dict(target=[1]), "target must be a tensor; got list"),
        (dict(target=X.bool()), "target must hold class labels, int64 or int32; got torch.bool"),
        (dict(target=T[:3]), r"target must have shape \(4,\), that of input \(4, 8\) .*; got \(3,"),
        (dict(input=X[0]), r"target must have shape \(\), that of input \(8,\) .*; got \(4,\)"),
        (dict(input=X[0, 0]), r"input must have a dimension of classes; got shape \(\)"),
        (dict(input=X[:, :0]), r"input \(4, 0\) has no classes"),
        (dict(target=T.to("meta")), "target must be on cpu like input; got meta"),
        (dict(reduction="max"), "reduction must be 'none', 'mean' or 'sum'; got 'max'"),
        (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\]; got 1.5"),
        (dict(target=T + 1), r"target must be in \[0, 8\) or .* -100; got 8 at position \(1,\)"),
        (dict(ignore_index=7), r"target must be in \[0, 8\) or .* 7; got -100 at position \(2,\)"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, arguments, sentence):
    arguments = {"input": X, "target": T, **arguments}
    with pytest.raises(ValueError, match="^cross_entropy: " + sentence):
        sk.cross_entropy(**arguments, backend=backend)
