"""nn.TransformerEncoder in evaluation, where torch leaves padding out and gives zeros there."""

import copy

import pytest
import torch
from torch import nn

import slimkernels.nn as slim_nn
from slimkernels import replace, use_backend
from slimkernels.nn import _torchs_own, transformer
from slimkernels.testing import assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

B, T, C = 4, 11, 48
ENDS = torch.arange(T) >= torch.tensor([[11], [4], [0], [7]])
HOLES = (ENDS & (torch.arange(T) > 0)) | (torch.arange(T) == 2)


class Stack(nn.TransformerEncoder):
    """A user's own, which is left, and hands its layers NestedTensors."""


def encoder(cls=nn.TransformerEncoder, activation="gelu", norm=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(C, 4, 64, 0.1, activation, batch_first=True)
    stack = cls(layer, 2, nn.LayerNorm(C) if norm else None).eval()
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.2)
    return stack


def check(theirs, padding):
    x = torch.randn(B, T, C)
    ours = replace(theirs, inplace=False).model
    truth = copy.deepcopy(theirs).double()
    with torch.no_grad():
        y, eager, true = (
            m(x.to(dtype), src_key_padding_mask=padding)
            for m, dtype in ((ours, x.dtype), (theirs, x.dtype), (truth, torch.float64))
        )
    assert_no_worse(y, eager, true)
    return ours, y


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each call of the layers' attention has."""
    seen, attend = [], transformer.scaled_dot_product_attention

    def record(query, *args, **kwargs):
        seen.append(query.shape[0])
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(transformer, "scaled_dot_product_attention", record)
    return seen


@pytest.mark.parametrize("activation, norm", [("relu", False), ("gelu", True)])
def test_padding_is_left_out_and_gives_zeros(activation, norm, calls):
    ours, y = check(encoder(activation=activation, norm=norm), ENDS)
    zeros = ours.norm(torch.zeros(C)) if norm else torch.zeros(C)
    assert calls == [22, 22] and (y[ENDS] == zeros).all()


class NoFastPath(torch.no_grad):
    """torch's own switch, as a context without gradients."""

    def __enter__(self):
        super().__enter__()
        torch.backends.mha.set_fastpath_enabled(False)

    def __exit__(self, *error):
        torch.backends.mha.set_fastpath_enabled(True)
        super().__exit__(*error)


@pytest.mark.parametrize(
    "where, padding, mask",
    [
        (torch.no_grad, HOLES, None),
        (torch.enable_grad, ENDS, None),
        (torch.no_grad, ENDS, torch.zeros(T, T, dtype=torch.bool)),
        (NoFastPath, ENDS, None),
    ],
    ids=["holes", "gradients", "a mask", "switched off"],
)
def test_elsewhere_padded_rows_are_as_from_torchs_ordinary_path(where, padding, mask, calls):
    padding = padding & (torch.arange(T) > 0)  # a row of padding alone is NaN there
    theirs, x = encoder(), torch.randn(B, T, C)
    ours = replace(theirs, inplace=False).model
    truth = copy.deepcopy(theirs).double()
    with where():
        results = (m(x, mask, padding) for m in (ours, theirs))
        assert_no_worse(*results, truth(x.double(), mask, padding))
    assert calls == []


def test_training_keeps_padding(calls):
    ours, x = replace(encoder(), inplace=False).model, torch.randn(B, T, C)
    ours.layers[1].self_attn.train().dropout = 0.5  # Monte Carlo dropout
    with torch.no_grad():
        first, second = (ours(x, src_key_padding_mask=ENDS) for _ in range(2))
        ours.train()(x, src_key_padding_mask=ENDS)
    assert calls == [] and not torch.equal(first, second)


@pytest.mark.parametrize("smallest", [0, 65536])
def test_autocast_where_torchs_path_raises(smallest, monkeypatch):
    monkeypatch.setattr(_torchs_own, "MIN_ELEMENTS", smallest)
    theirs, x = encoder(), torch.randn(B, T, C)
    ours = replace(theirs, inplace=False).model
    truth = copy.deepcopy(theirs).double()(x.double(), src_key_padding_mask=ENDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ours(x, src_key_padding_mask=ENDS)
        with NoFastPath():
            eager = theirs(x, src_key_padding_mask=ENDS)
    assert_no_worse(y[~ENDS], eager[~ENDS], truth[~ENDS])


def test_a_hook_on_a_layer_sees_it_padded(calls):
    theirs = encoder()
    ours = replace(theirs, inplace=False).model
    seen = []
    ours.layers[1].register_forward_hook(lambda _, __, y: seen.append(y.shape))
    x = torch.randn(B, T, C)
    truth = copy.deepcopy(theirs).double()
    with torch.no_grad():
        y, eager = (m(x, src_key_padding_mask=ENDS) for m in (ours, theirs))
        assert_no_worse(y, eager, truth(x.double(), src_key_padding_mask=ENDS))
    assert seen == [x.shape] and calls == []


def test_a_stack_that_is_left_hands_swapped_layers_nested_tensors():
    ours, y = check(encoder(Stack), ENDS)
    assert type(ours) is Stack and type(ours.layers[0]) is slim_nn.TransformerEncoderLayer
    assert (y[ENDS] == ours.norm(torch.zeros(C))).all()


def test_small_calls_take_torchs_path(monkeypatch):
    monkeypatch.undo()
    theirs, x = encoder(), torch.randn(B, T, C)
    ours = replace(theirs, inplace=False).model
    attention = theirs.layers[0].self_attn, ours.layers[0].self_attn
    with torch.no_grad():
        for padding in (None, ENDS):
            y, expected = (m(x, src_key_padding_mask=padding) for m in (ours, theirs))
            assert torch.equal(y, expected)
        y, expected = (m(x, x, x)[0] for m in attention)
        assert torch.equal(y, expected)
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
    with torch.no_grad(), use_backend("torch"):  # an order, which torch's path would not obey
        ours(x), ours(x, src_key_padding_mask=ENDS)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_go_to_torch(layout):
    rows = [torch.randn(3, 8), torch.randn(5, 8)]
    x = torch.nested.nested_tensor(rows, layout=layout)
    for theirs in (nn.LayerNorm(8), nn.RMSNorm(8), nn.GELU(), nn.SiLU(), nn.Softmax(-1)):
        if layout == torch.strided and type(theirs) is nn.RMSNorm:
            continue  # torch cannot
        ours = replace(theirs, inplace=False).model
        for y, expected in zip(ours(x).unbind(), theirs(x).unbind(), strict=True):
            assert torch.equal(y, expected)


def test_nested_tensors_go_to_torchs_attention():
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    ours = replace(theirs, inplace=False).model
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        y, expected = (m(x, x, x, need_weights=False)[0] for m in (ours, theirs))
    assert all(map(torch.equal, y.unbind(), expected.unbind()))
