import copy
import pickle

import pytest
import torch
from module_cases import assert_model_no_worse, outputs_and_gradients
from op_cases import maybe_compiled
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

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


class Adapter(torch.nn.Module):
    """A layer and a product of low rank beside it (Hu et al. 2021, LoRA)."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(3)
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubling(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass(layer):
    layer.linear2 = Doubling(40, C)
    torch.nn.init.constant_(layer.linear2.weight, 0.1), torch.nn.init.ones_(layer.linear2.bias)


def replace_forward(layer):
    own = layer.linear1.forward
    layer.linear1.forward = lambda x: 2 * own(x)


def hook_activation(layer):
    layer.activation = torch.nn.GELU()
    layer.activation.register_forward_hook(double)


def prune_and_train(linear, name):
    """A step changes the parameter under the mask: `linear` has the product from its next call."""
    prune.l1_unstructured(linear, name, 0.5)
    with torch.no_grad():
        getattr(linear, name + "_orig").mul_(2)


def double(module, inputs, output):
    return 2 * output


def double_gradient(module, gradients, _):
    return tuple(2 * g for g in gradients)


def set_child(name, make):
    return lambda layer: setattr(layer, name, make(getattr(layer, name)))


# What users do to a layer's parts, to torch's and to ours alike.
CHANGES = {
    "adapter around linear1": set_child("linear1", Adapter),
    "adapter around linear2": set_child("linear2", Adapter),
    "subclass for linear2": subclass,
    "forward of linear1 replaced": replace_forward,
    "linear1 pruned": lambda layer: prune_and_train(layer.linear1, "weight"),
    "linear2 pruned": lambda layer: prune_and_train(layer.linear2, "bias"),
    "linear1 parametrized": lambda layer: weight_norm(layer.linear1),
    "hook on linear1": lambda layer: layer.linear1.register_forward_hook(double),
    "hook on linear2": lambda layer: layer.linear2.register_full_backward_hook(double_gradient),
    "hook on the activation": hook_activation,
    "hook on dropout1": lambda layer: layer.dropout1.register_forward_hook(double),
    "hook on norm1": lambda layer: layer.norm1.register_forward_hook(double),
    "hook before norm2": lambda layer: layer.norm2.register_forward_pre_hook(lambda _, x: -x[0]),
    "identity for dropout1": set_child("dropout1", lambda _: torch.nn.Identity()),
    "identity for dropout2": set_child("dropout2", lambda _: torch.nn.Identity()),
    "another norm1": set_child("norm1", lambda _: torch.nn.RMSNorm(C)),
    "another norm2": set_child("norm2", lambda _: torch.nn.RMSNorm(C)),
    "torch's norm1": set_child("norm1", lambda _: torch.nn.LayerNorm(C, eps=0.1)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_changed_parts_take_part(norm_first, activation, change):
    # Made thrice, not copied: a pruned module cannot be copied.
    (ours, theirs), (_, wide) = (
        layers(norm_first=norm_first, activation=activation) for _ in range(2)
    )
    for layer in (ours, theirs, wide):
        CHANGES[change](layer)
    x = torch.randn(5 * T, B, C)  # of fewer tokens eager's largest error is a matter of luck
    before = layers(norm_first=norm_first, activation=activation)[0](x)
    actual, eager, truth = (
        outputs_and_gradients(layer, lambda m, x: m(x), (x.to(dtype),))
        for layer, dtype in ((ours, x.dtype), (theirs, x.dtype), (wide.double(), torch.float64))
    )
    assert_model_no_worse(actual, eager, truth)
    silent = change.startswith("identity") or "linear2" in change and "hook" in change
    assert torch.equal(before, actual["output 0"]) == silent


@pytest.mark.parametrize("change", ["adapter around linear1", "another norm1"])
def test_a_changed_layer_compiles_whole(change):
    ours, theirs = layers(activation="gelu", batch_first=True)
    for layer in (ours, theirs):
        CHANGES[change](layer)
    check(ours, theirs, torch.randn(B, T, C), compiled=True)


@pytest.mark.parametrize("place", ["dropout", "dropout1", "dropout2"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_each_dropout_has_a_mode_of_its_own(norm_first, place):
    """On in a layer that evaluates, as Monte Carlo dropout has it, and off in one that trains."""
    for layer in layers(norm_first=norm_first):
        x = torch.randn(T, B, C)
        expected = layer(x)
        for name in ("dropout", "dropout1", "dropout2"):
            getattr(layer, name).p = 0.5 if name == place else 0.0
        layer.eval()
        getattr(layer, place).train()
        assert not torch.equal(layer(x), layer(x))
        layer.train()
        getattr(layer, place).eval()
        assert torch.equal(layer(x), expected)


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
