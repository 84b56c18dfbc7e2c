import copy
import pickle

import pytest
import torch
from module_cases import outputs_and_gradients

import slimkernels.nn as slim_nn
from slimkernels.dispatch import use_backend
from slimkernels.testing import assert_no_worse

CASES = {
    "layer norm": ("LayerNorm", (24,), {}),
    "layer norm of two dimensions": ("LayerNorm", ((3, 24),), {"eps": 1e-3}),
    "layer norm without bias": ("LayerNorm", (24,), {"bias": False}),
    "layer norm without parameters": ("LayerNorm", (24,), {"elementwise_affine": False}),
    "rms norm": ("RMSNorm", (24,), {}),
    "rms norm of two dimensions": ("RMSNorm", ((3, 24),), {"eps": 1e-3}),
    "rms norm without parameters": ("RMSNorm", (24,), {"elementwise_affine": False}),
    "group norm": ("GroupNorm", (3, 3), {}),
    "group norm of one group": ("GroupNorm", (1, 3), {"eps": 1e-3}),
    "group norm without bias": ("GroupNorm", (3, 3), {"bias": False}),
    "group norm without parameters": ("GroupNorm", (1, 3), {"affine": False}),
    "gelu": ("GELU", (), {}),
    "gelu by tanh": ("GELU", ("tanh",), {}),
    "silu": ("SiLU", (), {}),
    "softmax": ("Softmax", (-1,), {}),
    "softmax of another dimension": ("Softmax", (1,), {}),
    "log softmax": ("LogSoftmax", (-1,), {}),
}


def pair(name, args, kwargs, **where):
    torch.manual_seed(0)
    theirs = getattr(torch.nn, name)(*args, **kwargs, **where)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours = getattr(slim_nn, name)(*args, **kwargs, **where)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("case", CASES)
def test_drops_in_for_torch(case, backend):
    ours, theirs = pair(*CASES[case])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert repr(ours) == repr(theirs)
    x = torch.randn(5, 3, 24)

    def call(module, x):
        return module(x)

    with use_backend(backend):
        actual = outputs_and_gradients(ours, call, (x,))
    eager = outputs_and_gradients(theirs, call, (x,))
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), call, (x.double(),))
    for name, expected in truth.items():
        assert_no_worse(actual[name], eager[name], expected, what=name)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"label_smoothing": 0.1},
        {"reduction": "sum"},
        {"reduction": "none", "ignore_index": 2},
        {"weight": torch.arange(31.0)},
    ],
    ids=str,
)
def test_cross_entropy_loss_drops_in(kwargs):
    ours, theirs = slim_nn.CrossEntropyLoss(**kwargs), torch.nn.CrossEntropyLoss(**kwargs)
    assert repr(ours) == repr(theirs)
    torch.manual_seed(0)
    logits, target = torch.randn(9, 31), torch.randint(0, 31, (9,))
    target[3] = 2 if "ignore_index" in kwargs else -100

    def call(module, logits):
        return module(logits, target)

    actual, eager = (outputs_and_gradients(m, call, (logits,)) for m in (ours, theirs))
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), call, (logits.double(),))
    for name, expected in truth.items():
        assert_no_worse(actual[name], eager[name], expected, what=name)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy_is_linear_into_cross_entropy(bias):
    torch.manual_seed(0)
    ours = slim_nn.LinearCrossEntropy(24, 31, bias, label_smoothing=0.1)
    theirs = torch.nn.Linear(24, 31, bias)
    theirs.load_state_dict(ours.state_dict())
    assert repr(theirs)[:-1] in repr(ours).replace("LinearCrossEntropy", "Linear")
    x, target = torch.randn(3, 5, 24), torch.randint(31, (3, 5))
    target[1, 2] = -100

    def eager(module, x):
        loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        return loss(module(x).flatten(0, 1), target.flatten())

    actual = outputs_and_gradients(ours, lambda module, x: module(x, target), (x,))
    baseline = outputs_and_gradients(theirs, eager, (x,))
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), eager, (x.double(),))
    for name, expected in truth.items():
        assert_no_worse(actual[name], baseline[name], expected, what=name)


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles(case):
    ours, _ = pair(*CASES[case])
    x = torch.randn(2, 3, 24)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours) and torch.equal(other(x), ours(x))


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: slim_nn.SiLU(inplace=True), "SiLU: inplace=True is not implemented"),
        (lambda: slim_nn.Softmax(), "^Softmax: dim must be given"),
        (lambda: slim_nn.LogSoftmax(), "^LogSoftmax: dim must be given"),
        (lambda: slim_nn.CrossEntropyLoss(size_average=True), "use reduction"),
        (lambda: slim_nn.CrossEntropyLoss(reduce=False), "use reduction"),
        (lambda: slim_nn.CrossEntropyLoss(reduction="max"), "must be .* or 'sum'; got 'max'"),
        (
            lambda: slim_nn.CrossEntropyLoss(label_smoothing=2),
            r"^Cross.*must be in \[0, 1\]; got 2",
        ),
        (lambda: slim_nn.LinearCrossEntropy(2, 3, reduction=1), "must be .* or 'sum'; got 1"),
        (
            lambda: slim_nn.LinearCrossEntropy(2, 3, softcap=-1.0),
            "^Linear.*softcap must be None or",
        ),
        (
            lambda: slim_nn.LinearCrossEntropy(2, 3)(torch.ones(1, 4), torch.ones(1).long()),
            r"^LinearCrossEntropy: input must have a last dimension of 2, in_features; .*\(1, 4\)",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_dropout_drops_its_share_and_passes_the_same_gradients():
    torch.manual_seed(0)
    dropout, x = slim_nn.Dropout(0.25), torch.ones(64, 256, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    torch.testing.assert_close(y.unique(), torch.tensor([0, 1 / 0.75]))
    assert (y == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x
    assert (slim_nn.Dropout(1.0)(x) == 0).all()
    assert slim_nn.Dropout(0.5)(torch.ones(())).shape == ()
    written = x.detach().clone()
    assert slim_nn.Dropout(0.5, inplace=True)(written) is written
