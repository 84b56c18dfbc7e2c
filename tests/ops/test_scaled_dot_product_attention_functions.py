"""Your own score functions: how long they live, that they can be pickled, and their errors."""

import copy
import gc
import pickle
import re

import attention_drawn
import pytest
import torch
from attention_cases import NAME
from op_cases import device_of, skip_unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import slimkernels as sk

triton = pytest.importorskip("triton")
TILTED = attention_drawn.TILTED


def tilted():
    return sk.ScoreFunction(**TILTED)


def attend(backend, function, query):
    variant = sk.AttentionVariant(score=function)
    key = query.detach()  # one gradient, for a sum of three has no fixed order
    skip_unsupported(NAME, backend, query, key, key, variant=variant)
    return sk.scaled_dot_product_attention(query, key, key, variant=variant, backend=backend)


def query_of(backend):
    torch.manual_seed(0)
    return torch.randn(1, 1, 5, 16, device=device_of(backend), requires_grad=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_function_lives_until_backward_and_no_longer(backend):
    query = query_of(backend)
    (expected,) = torch.autograd.grad(attend(backend, function := tilted(), query).sum(), query)
    name = function.name
    y = attend(backend, function, query)
    del function
    gc.collect()
    y.sum().backward()
    assert torch.equal(query.grad, expected)
    del y
    gc.collect()
    assert name not in sk.ScoreFunction._known


def test_a_compiled_graph_keeps_its_function():
    def compiled_with(function):
        return torch.compile(lambda q: attend("triton", function, q), backend="aot_eager")

    query, function = query_of("triton"), tilted()
    (expected,) = torch.autograd.grad(attend("triton", function, query).sum(), query)
    y, name = compiled_with(function)(query), function.name
    del function
    torch._dynamo.reset()
    gc.collect()
    y.sum().backward()  # which has but the name
    assert torch.equal(query.grad, expected) and name in sk.ScoreFunction._known


def test_a_graph_is_not_compiled_again_when_others_are_made():
    query, function = query_of("triton"), tilted()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q: attend("triton", function, q), backend=counter, fullgraph=True
    )
    others = []
    for _ in range(3):
        assert compiled(query).any()
        others = [*others[1:], tilted(), tilted()]
    assert counter.frame_count == 1


def test_a_copy_is_the_function_itself():
    function = tilted()
    assert copy.copy(function) is copy.deepcopy(function) is function


def test_a_function_can_be_pickled():
    function = sk.ScoreFunction(**TILTED)
    again = pickle.loads(pickle.dumps(sk.AttentionVariant(score=function))).score
    assert again is not function and again.name != function.name
    for form in ("score", "derivative", "torch_score", "mask", "torch_mask"):
        assert getattr(again, form) is getattr(function, form)


def test_a_function_that_no_module_has_cannot_be_pickled():
    function = sk.ScoreFunction(**TILTED | {"torch_score": lambda *arguments: arguments[0]})
    sentence = "ScoreFunction: torch_score must stand at the top of a module to be pickled; got "
    with pytest.raises(pickle.PicklingError, match=f"^{sentence}test_a_.*<lambda>$"):
        pickle.dumps(function)


def two_parameters(score, batch):
    return score


@pytest.mark.parametrize(
    "functions, sentence",
    [
        ({"torch_score": two_parameters}, "torch_score must take (score, batch, head, i, j, tens"),
        ({"score": triton.jit(two_parameters)}, "score must take (score, batch, head, i, j, tens"),
        ({"derivative": triton.jit(two_parameters)}, "derivative must take (score, batch, head, i"),
    ],
)
def test_wrong_parameters_are_one_sentence(functions, sentence):
    with pytest.raises(ValueError, match=f"^ScoreFunction: {re.escape(sentence)}") as raised:
        sk.ScoreFunction(**TILTED | functions)
    assert str(raised.value).endswith("; got two_parameters(score, batch)")


def raises(score, batch, head, i, j, tensors):
    return tensors[3]


def is_float(batch, head, i, j, tensors):
    return i * 1.0


def is_large(score, batch, head, i, j, tensors):
    return torch.zeros(5, 5, 5, 5)


def is_number(score, batch, head, i, j, tensors):
    return 3


FAULTS = [
    ("score", raises, "torch_score raises raises IndexError: tuple index out of range"),
    (
        "score",
        is_large,
        "torch_score is_large must return a floating tensor that broadcasts to (1, ",
    ),
    ("score", is_number, "torch_score is_number must return a floating tensor that broadcasts to"),
    (
        "mask",
        is_float,
        "torch_mask is_float must return a bool tensor that broadcasts to (1, 1, 5, ",
    ),
]


@pytest.mark.parametrize("what, function, sentence", FAULTS)
def test_what_a_torch_function_does_wrong_is_one_sentence(what, function, sentence):
    kernel = attention_drawn.FUNCTIONS["prefix"].mask if what == "mask" else TILTED["score"]
    wrong = sk.ScoreFunction(**{what: kernel, f"torch_{what}": function})
    with pytest.raises((ValueError, RuntimeError), match=f"^{NAME}: {re.escape(sentence)}"):
        attend("torch", wrong, query_of("torch"))


@triton.jit
def _fails(score, batch, head, i, j, tensors):
    return score + tensors[3]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_a_triton_function_does_wrong_names_it(direction):
    form = {"forward": "score", "backward": "derivative"}[direction]
    function = sk.ScoreFunction(**TILTED | {form: _fails})
    query = query_of("triton")
    with pytest.raises(RuntimeError, match=f"^{NAME}: the kernel with the score function .* fails"):
        attend("triton", function, query).sum().backward()
