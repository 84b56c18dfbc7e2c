import copy
import pickle

import pytest
import torch
from module_cases import assert_model_no_worse, outputs_and_gradients
from op_cases import maybe_compiled

import slimkernels.nn as slim_nn
from slimkernels.dispatch import use_backend

B, T, C, H = 3, 7, 24, 4
ENDS = torch.arange(T) >= torch.tensor([[7], [4], [2]])  # (B, T)
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu by tanh": torch.nn.GELU("tanh"),
    "another": torch.nn.functional.silu,
}


def layers(seed=0, **kwargs):
    pair = []
    for module in (slim_nn, torch.nn):
        torch.manual_seed(seed)
        pair.append(module.TransformerEncoderLayer(C, H, 40, dropout=0.0, **kwargs))
    ours, theirs = pair
    for (name, p), other in zip(
        ours.state_dict().items(), theirs.state_dict().values(), strict=True
    ):
        assert torch.equal(p, other), name  # the same seed gives the same parameters
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def check(ours, theirs, x, compiled=False, **masks):
    function = maybe_compiled(ours, compiled)

    def call(module, x):
        return (function if module is ours else module)(x, **masks)

    eager = outputs_and_gradients(theirs, call, (x,))
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), call, (x.double(),))
    for backend in (None, "torch"):
        with use_backend(backend):
            assert_model_no_worse(outputs_and_gradients(ours, call, (x,)), eager, truth)


@pytest.mark.parametrize("masked", ["none", "padding", "causal"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_layer_drops_in(norm_first, batch_first, masked):
    ours, theirs = layers(norm_first=norm_first, batch_first=batch_first)
    masks = {
        "none": {},
        "padding": {"src_key_padding_mask": ENDS},
        "causal": {"src_mask": CAUSAL, "is_causal": True},
    }[masked]
    check(ours, theirs, torch.randn((B, T, C) if batch_first else (T, B, C)), **masks)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer_with_every_activation(activation, bias):
    ours, theirs = layers(activation=ACTIVATIONS[activation], bias=bias, batch_first=True)
    check(ours, theirs, torch.randn(B, T, C))


@pytest.mark.parametrize("norm_first", [True, False])
def test_layer_compiles_whole(norm_first):
    ours, theirs = layers(norm_first=norm_first, batch_first=True, activation="gelu")
    check(ours, theirs, torch.randn(B, T, C), compiled=True, src_key_padding_mask=ENDS)


def encoders(**kwargs):
    ours, theirs = layers(batch_first=True, activation="gelu", **kwargs)
    ours = slim_nn.TransformerEncoder(ours, 2, slim_nn.LayerNorm(C))
    theirs = torch.nn.TransformerEncoder(
        theirs, 2, torch.nn.LayerNorm(C), enable_nested_tensor=False
    )
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("masked", ["none", "padding", "causal promised", "causal found"])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_drops_in(training, masked):
    ours, theirs = encoders()
    masks = {
        "none": {},
        "padding": {"src_key_padding_mask": ENDS},
        "causal promised": {"mask": CAUSAL, "is_causal": True},
        "causal found": {"mask": torch.zeros(T, T).masked_fill(CAUSAL, float("-inf"))},
    }[masked]
    ours.train(training), theirs.train(training)
    check(ours, theirs, torch.randn(B, T, C), **masks)


def test_encoder_without_gradients_agrees_with_torchs_fast_path():
    ours, theirs = encoders()
    ours.eval(), theirs.eval()
    x = torch.randn(B, T, C)
    with torch.no_grad():
        actual, fast = ours(x), theirs(x)
        truth = copy.deepcopy(theirs).double()(x.double())
    assert_model_no_worse({"y": actual}, {"y": fast}, {"y": truth})


def test_encoder_takes_torchs_layers():
    _, theirs = layers(batch_first=True)
    x = torch.randn(B, T, C)
    wrapped = slim_nn.TransformerEncoder(theirs, 2)
    assert torch.equal(wrapped(x), wrapped.layers[1](wrapped.layers[0](x)))


def test_torchs_encoder_takes_our_layers():
    ours, theirs = layers(batch_first=True, activation="gelu")
    with pytest.warns(UserWarning, match="enable_nested_tensor"):
        wrapped = torch.nn.TransformerEncoder(ours, 1).eval()
    x = torch.randn(B, T, C)
    with torch.no_grad():
        actual = wrapped(x, src_key_padding_mask=ENDS)
        eager = theirs(x, src_key_padding_mask=ENDS)
        truth = theirs.double()(x.double(), src_key_padding_mask=ENDS)
    assert_model_no_worse({"y": actual}, {"y": eager}, {"y": truth})


@pytest.mark.parametrize("place", ["dropout", "dropout1", "dropout2", "attention"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_drops_out_at_every_place_in_training_only(norm_first, place):
    ours, _ = layers(norm_first=norm_first)
    x = torch.randn(T, B, C)
    expected = ours(x)
    if place == "attention":
        ours.self_attn.dropout = 0.5
    else:
        getattr(ours, place).p = 0.5
    first, second = ours(x), ours(x)
    assert not torch.equal(first, second) and not torch.equal(first, expected)
    assert torch.equal(ours.eval()(x), expected)


def test_copies_and_pickles():
    ours, _ = encoders()
    x = torch.randn(B, T, C)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), ours(x))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be 'relu', 'gelu' or a .*; got 'swish'"):
        slim_nn.TransformerEncoderLayer(C, H, activation="swish")
