"""Cross-entropy's CUDA kernels on the CPU: see conftest.py."""

import pytest
import torch

import slimkernels as sk
from slimkernels.ops.cross_entropy import cross_entropy_reference
from slimkernels.testing import assert_op_matches

INF, NAN = float("inf"), float("nan")
REDUCTIONS = "none", "sum", "mean"
# Eight lanes a row, aligned and not; a warp; a block that walks; a cluster of two, aligned and not.
SHAPES = [(3, 1), (5, 37), (18, 64), (6, 515), (3, 4104), (1, 17000), (1, 17001)]
FEATURES = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0},
}


def inputs_of(shape, dtype=torch.float32, ignored=(1,)):
    x = torch.randn(shape).mul(3).to(dtype)
    target = torch.randint(shape[1], shape[:1])
    for row in ignored:
        target[row : row + 1] = -100
    return x, target


def same(x):
    return x


def unaligned(x):
    """The same numbers, an element past a 16-byte boundary."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def check(x, target, reduction="mean", return_lse=False, place=same, **features):
    """Of a call, its loss and lse and the gradient of x."""
    if "weight" in features:
        features["weight"] = torch.rand(x.shape[1])

    def ours(x):
        how = dict(features, reduction=reduction, return_lse=return_lse)
        return sk.cross_entropy(place(x), target, **how, backend="cuda")

    def definition(x):
        loss, lse = cross_entropy_reference(x, target, reduction=reduction, **features)
        return (loss, lse) if return_lse else loss

    return assert_op_matches(ours, definition, definition, (x,))


@pytest.mark.parametrize(
    "shape, features",
    [
        *((shape, "plain") for shape in (SHAPES[0], *SHAPES[2::2])),
        *((shape, "smoothing") for shape in SHAPES[1:4:2]),
        *((shape, "all") for shape in SHAPES[1:6]),
    ],
    ids=str,
)
def test_matches_reference(shape, features):
    return check(*inputs_of(shape), **FEATURES[features])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    inputs = [inputs_of(shape, dtype) for shape in ((5, 37), (9, 64), (3, 4104))]
    return [
        check(*given, **FEATURES["all"], reduction=r) for given in inputs for r in REDUCTIONS[:2]
    ]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_lse_and_its_gradient(reduction):
    x, target = inputs_of((1100, 6))  # more rows than the block that adds them up has threads
    return check(x, target, reduction, return_lse=True, **FEATURES["all"])


def test_labels_that_differ_little_at_large_logits():
    x, target = inputs_of((12, 70))
    return [check(x + offset, target, "none", label_smoothing=0.1) for offset in (-1e4, 1e4)]


@pytest.mark.parametrize("shape", [(0, 5), (4, 5)], ids=str)
def test_no_row_that_counts(shape):
    x, target = inputs_of(shape, ignored=range(4))
    x[1:2] = NAN
    return [check(x, target, reduction, return_lse=True) for reduction in ("sum", "mean")]


@pytest.mark.parametrize("V", [20, 1201])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_logits_that_are_not_finite(V, label_smoothing):
    x, target = torch.randn(6, V), torch.full((6,), 3)
    x[0, 5], x[1, 5], x[2, 5], x[3, 3] = NAN, INF, -INF, -INF
    x[4] = -INF
    x[5, : V - 1] = -INF
    return check(x, target, "none", label_smoothing=label_smoothing)


def test_a_label_out_of_range_gives_nan():
    # Past the check, which reads the labels of CPU tensors but not those of a GPU.
    from slimkernels.backends.cuda import cross_entropy

    x, target = torch.randn(4, 9), torch.tensor([9, -1, 8, 0])
    how = None, -100, "none", 0.0, 0.0, 0.0
    losses, stats, divisor, correct = cross_entropy.forward(x, target, *how, True)
    assert losses.isnan().tolist() == [True, True, False, False] and not correct[:2].any()
    dx = cross_entropy.backward(losses, None, x, target, how[0], stats, divisor, *how[1:])
    assert dx.isnan().all(1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("V", [33, 17000])
@pytest.mark.parametrize("softcap", [None, 0.01])
def test_which_labels_are_the_argmax(V, softcap):
    rows = [
        ({V - 1: 1.0}, V - 1),
        ({V - 1: 1.0, 17: 0.5}, 17),
        ({20: 1.0, 21: 1.0}, 20),
        ({20: 1.0, 21: 1.0}, 21),
        ({3: 1.0, V - 2: 1.0}, 3),
        ({3: 1.0, V - 2: 1.0}, V - 2),
        ({}, 0),
        ({7: INF, 9: INF}, 7),
        ({7: INF, 9: NAN}, 7),
        ({7: INF, 9: NAN}, 9),
        ({7: NAN, 9: NAN}, 9),
        (dict.fromkeys(range(V), -INF), 0),
        (dict.fromkeys(range(V), -INF), 1),
        ({5: 1.0}, -100),
    ]
    rows = rows if V < 100 else rows[2:6]
    x, target = torch.zeros(len(rows), V), torch.tensor([label for _, label in rows])
    for row, (logits, _) in zip(x, rows, strict=True):
        row[list(logits)] = torch.tensor(list(logits.values()))
    loss, correct = sk.cross_entropy(
        x, target, softcap=softcap, reduction="none", return_correct=True, backend="cuda"
    )
    assert torch.equal(correct, x.argmax(-1) == target)
    return loss, correct


def test_unaligned_logits_take_the_narrow_path():
    x, target = torch.randn(3, 1032), torch.tensor([1031, 0, 4])
    return check(x, target, place=unaligned, weight=True, label_smoothing=0.1)


def test_probabilities_are_refused_in_a_sentence():
    x = torch.randn(3, 5)
    with pytest.raises(sk.BackendError, match="it is written for class labels, and target holds"):
        sk.cross_entropy(x, x.softmax(-1), backend="cuda")
