import copy
import pickle

import pytest
import torch
from module_cases import assert_model_no_worse, outputs_and_gradients
from op_cases import maybe_compiled

import slimkernels.nn as slim_nn
from slimkernels.dispatch import use_backend

B, Tq, Tk, C, H = 3, 6, 9, 48, 4
CAUSAL = torch.ones(Tq, Tq, dtype=torch.bool).triu(1)
ENDS = torch.arange(Tq) >= torch.tensor([[6], [4], [2]])  # (B, Tq)
MEMORY_ENDS = torch.arange(Tk) >= torch.tensor([[9], [3], [7]])  # (B, Tk)
PAIRS = torch.rand(Tq, Tk, generator=torch.Generator().manual_seed(1)) < 0.4
PAIRS[:, 0] = False
ADDED = torch.randn(Tq, Tk, generator=torch.Generator().manual_seed(2))
MASKS = {
    "none": {},
    "causal and memory's padding": {
        "tgt_mask": CAUSAL,
        "tgt_is_causal": True,
        "memory_key_padding_mask": MEMORY_ENDS,
    },
    "padding and pairs": {"tgt_key_padding_mask": ENDS, "memory_mask": PAIRS},
    "added": {"tgt_mask": torch.zeros(Tq, Tq).masked_fill(CAUSAL, -2.0), "memory_mask": ADDED},
}


def layers(**kwargs):
    pair = []
    for module in (slim_nn, torch.nn):
        torch.manual_seed(0)
        pair.append(module.TransformerDecoderLayer(C, H, 40, dropout=0.0, **kwargs))
    ours, theirs = pair
    state, other = ours.state_dict(), theirs.state_dict()
    assert list(state) == list(other), "the same keys in the same order"
    # The same seed gives the same parameters.
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.values(), strict=True))
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(batch_first=True):
    torch.manual_seed(3)
    tgt, memory = torch.randn(B, Tq, C), torch.randn(B, Tk, C)
    return (tgt, memory) if batch_first else (tgt.transpose(0, 1), memory.transpose(0, 1))


def check(ours, theirs, xs, masks=None, compiled=False):
    masks = masks or {}
    wide = {
        name: mask.double() if torch.is_tensor(mask) and mask.is_floating_point() else mask
        for name, mask in masks.items()
    }
    function = maybe_compiled(ours, compiled)
    eager = outputs_and_gradients(theirs, lambda m, *xs: m(*xs, **masks), xs)
    double = copy.deepcopy(theirs).double()
    truth = outputs_and_gradients(
        double, lambda m, *xs: m(*xs, **wide), tuple(x.double() for x in xs)
    )
    for backend in (None,) if compiled else (None, "torch"):
        with use_backend(backend):
            actual = outputs_and_gradients(ours, lambda _, *xs: function(*xs, **masks), xs)
        assert_model_no_worse(actual, eager, truth)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("norm_first, batch_first", [(True, False), (False, True)])
def test_layer_drops_in(norm_first, batch_first, masks):
    ours, theirs = layers(norm_first=norm_first, batch_first=batch_first, activation="gelu")
    check(ours, theirs, inputs(batch_first), MASKS[masks])


def test_layer_without_batch_or_bias():
    ours, theirs = layers(bias=False)
    check(ours, theirs, tuple(x[:, 0] for x in inputs(batch_first=False)))


def test_layer_compiles_whole():
    ours, theirs = layers(batch_first=True, activation="gelu")
    check(ours, theirs, inputs(), MASKS["causal and memory's padding"], compiled=True)


@pytest.mark.parametrize("mask", ["bool", "floating", "floating, not quite causal"])
def test_stack_drops_in_and_sees_that_a_mask_is_causal(mask, monkeypatch):
    ours, theirs = (
        module.TransformerDecoder(layer, 2, module.LayerNorm(C))
        for module, layer in zip((slim_nn, torch.nn), layers(batch_first=True), strict=True)
    )
    tgt_mask = CAUSAL if mask == "bool" else torch.zeros(Tq, Tq).masked_fill(CAUSAL, -torch.inf)
    if "not" in mask:
        tgt_mask[0, 1] = 0.5
    masks = {"tgt_mask": tgt_mask, "memory_key_padding_mask": MEMORY_ENDS}
    check(ours, theirs, inputs(), masks)
    told = []
    forward = slim_nn.TransformerDecoderLayer.forward
    monkeypatch.setattr(
        slim_nn.TransformerDecoderLayer,
        "forward",
        lambda self, *a, **k: told.append(k["tgt_is_causal"]) or forward(self, *a, **k),
    )
    ours(*inputs(), **masks)
    assert told == ["not" not in mask] * 2


@pytest.mark.parametrize("place", ["dropout", "dropout1", "dropout2", "dropout3", "self", "cross"])
def test_drops_out_at_every_place_in_training_only(place):
    for norm_first in (False, True):
        ours, _ = layers(norm_first=norm_first)
        xs = inputs(batch_first=False)
        expected = ours(*xs)
        if place == "self":
            ours.self_attn.dropout = 0.5
        elif place == "cross":
            ours.multihead_attn.dropout = 0.5
        else:
            getattr(ours, place).p = 0.5
        first, second = ours(*xs), ours(*xs)
        assert not torch.equal(first, second) and not torch.equal(first, expected)
        assert torch.equal(ours.eval()(*xs), expected)


def test_changed_parts_take_part():
    for norm_first in (False, True):
        for name in ("norm1", "norm2", "norm3", "linear1", "linear2", "multihead_attn"):
            ours, theirs = layers(norm_first=norm_first, batch_first=True)
            for layer in (ours, theirs):
                getattr(layer, name).register_forward_hook(
                    lambda _, __, y: (2 * y[0], y[1]) if isinstance(y, tuple) else 2 * y
                )
            check(ours, theirs, inputs())


def test_copies_and_pickles():
    ours, _ = layers(batch_first=True)
    ours = slim_nn.TransformerDecoder(ours, 2)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(*inputs()), ours(*inputs()))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="^TransformerDecoderLayer: activation must be .* 'swish'"):
        slim_nn.TransformerDecoderLayer(C, H, activation="swish")
