import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from module_cases import assert_model_no_worse, outputs_and_gradients

from slimkernels.dispatch import use_backend
from slimkernels.models.block import Block, Wanted
from slimkernels.models.embedding import _TiedEmbedding
from slimkernels.ops.linear import linear

T = 9
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
NAMES = {
    "qkv": "self_attn.in_proj_",
    "attention_output": "self_attn.out_proj.",
    "intermediate": "linear1.",
    "output": "linear2.",
}


class Blocks(torch.nn.Module):
    """Two blocks as a model assembles them, with the norm that comes before pre-norm ones."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first = torch.nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = torch.nn.ModuleList([Block(config), Block(config)])

    def forward(self, x, **kwargs):
        hidden = self.first(x) if self.config.norm_first else x
        residual = x
        for block in self.blocks:
            hidden, residual = block(hidden, residual, **kwargs)
        return hidden


def pair(config):
    """Our blocks, and torch's encoder with the same parameters."""
    torch.manual_seed(0)
    ours = Blocks(config)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = torch.nn.TransformerEncoderLayer(
        *(config.hidden_size, config.num_heads, config.intermediate_size, 0.0),
        activation=torch.nn.GELU("tanh" if config.activation == "gelu_tanh" else "none"),
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=config.norm_first,
    )
    final = torch.nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
    theirs = torch.nn.TransformerEncoder(
        layer, 2, final if config.norm_first else None, enable_nested_tensor=False
    )
    blocks, first = [b.state_dict() for b in ours.blocks], ours.first.state_dict()
    state = {}
    for i, block in enumerate(blocks):
        for name, their in NAMES.items():
            for kind in ("weight", "bias"):
                state[f"layers.{i}.{their}{kind}"] = block[f"{name}.{kind}"]
        for kind in ("weight", "bias"):
            norms = [block[f"attention_norm.{kind}"], block[f"output_norm.{kind}"]]
            if config.norm_first:  # the norm that ends a block is the next one's first
                before = blocks[i - 1][f"output_norm.{kind}"] if i else first[kind]
                norms = [before, norms[0]]
            for place, norm in enumerate(norms, 1):
                state[f"layers.{i}.norm{place}.{kind}"] = norm
            if config.norm_first:
                state[f"norm.{kind}"] = block[f"output_norm.{kind}"]
    theirs.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_is_torchs_encoder(config, norm_first, activation, is_causal, backend):
    config = dataclasses.replace(config, norm_first=norm_first, activation=activation)
    ours, theirs = pair(config)
    x = torch.randn(3, T, config.hidden_size)

    def call(module, x):
        if isinstance(module, Blocks):
            return module(x, is_causal=is_causal)
        return module(x, mask=CAUSAL if is_causal else None, is_causal=is_causal)

    with use_backend(backend):
        actual = outputs_and_gradients(ours, call, (x,))
    eager = outputs_and_gradients(theirs, call, (x,))
    truth = outputs_and_gradients(copy.deepcopy(theirs).double(), call, (x.double(),))
    shared = ("output 0", "gradient of input 0")
    assert_model_no_worse(*({name: r[name] for name in shared} for r in (actual, eager, truth)))


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("positions", [[0, 4, 5, 5, 8], [2], list(range(T))], ids=str)
def test_wanted_tokens_are_those_of_the_whole_block(config, positions, norm_first, backend):
    config = dataclasses.replace(config, norm_first=norm_first)
    torch.manual_seed(0)
    block = Block(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, residual = torch.randn(2, T, config.hidden_size)
    at, cu_seqlens = torch.tensor(positions, dtype=torch.int64), torch.tensor([0, 3, 5, T]).int()
    wanted = Wanted(at, torch.searchsorted(at, cu_seqlens.long()).int())

    def chosen(module, x, residual):
        return module(x, residual, cu_seqlens=cu_seqlens, wanted=wanted)

    def whole(module, x, residual):
        return tuple(t[at] for t in module(x, residual, cu_seqlens=cu_seqlens))

    with use_backend(backend):
        actual = outputs_and_gradients(block, chosen, (x, residual))
        eager = outputs_and_gradients(block, whole, (x, residual))
    wide = (x.double(), residual.double())
    truth = outputs_and_gradients(copy.deepcopy(block).double(), whole, wide)
    assert_model_no_worse(actual, eager, truth)


ENDS = torch.tensor([0, 5, T]).int()
WANTED = Wanted(torch.tensor([0, 4]), torch.tensor([0, 2, 2]).int())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"cu_seqlens": ENDS, "key_lengths": ENDS[1:]}, "key_lengths must be None with cu_seqlens"),
        ({"wanted": WANTED}, "cu_seqlens must be given with wanted; got None"),
        ({"wanted": WANTED, "key_lengths": ENDS[1:]}, "cu_seqlens must be given with wanted"),
        (
            {"wanted": WANTED, "cu_seqlens": ENDS, "is_causal": True},
            "is_causal must be False with wanted; got True",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(config, options, sentence):
    x = torch.randn(T, config.hidden_size)
    with pytest.raises(ValueError, match="^Block: " + sentence):
        Block(config)(x, x, **options)


@pytest.mark.parametrize("used", ["both", "rows", "matrix"])
def test_tied_embedding_has_the_gradients_of_two_uses(used):
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([4, 1, 4, 0])

    def call(weight):
        rows, matrix = _TiedEmbedding.apply(weight, ids)
        # Not linear, so that second derivatives are not zero.
        results = (rows.sin(), (matrix @ matrix.T).sin())
        return {"both": results, "rows": results[0], "matrix": results[1]}[used]

    assert torch.autograd.gradcheck(call, (weight,))
    assert torch.autograd.gradgradcheck(call, (weight,))


def test_tied_embedding_writes_no_gradient_that_others_hold():
    weight, x = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3)
    ids, dy, kept = torch.tensor([4, 1, 4, 0]), torch.randn(4, 6), []

    def call(dmatrix=None, keep=None):
        """The gradient of weight, and what arrived for the matrix."""
        rows, matrix = _TiedEmbedding.apply(weight, ids)
        if keep is not None:
            matrix.register_hook(keep)
        y, dy_ = (matrix.view(-1), dmatrix) if dmatrix is not None else (F.linear(x, matrix), dy)
        wanted = (weight, matrix) if keep is None and dmatrix is None else (weight,)
        return torch.autograd.grad((rows.sum(), y), wanted, (None, dy_))

    (expected,) = torch.autograd.grad(F.linear(x, weight), weight, dy)
    assert torch.equal(call()[1], expected)  # asked for
    call(keep=kept.append)  # kept by a hook
    assert torch.equal(kept[0], expected)
    given = torch.ones(18)  # given, as a view
    call(dmatrix=given)
    assert torch.equal(given, torch.ones(18))
    other = torch.ones(6, 3, requires_grad=True)  # of two nodes, one that runs after
    earlier = other * 1
    rows, matrix = _TiedEmbedding.apply(weight, ids)
    (rows.sum() + F.linear(x, matrix + earlier).sum()).backward()
    assert torch.equal(other.grad, torch.ones(4, 6).T @ x)


def test_tied_embedding_adds_to_the_decoders_gradient_in_place(monkeypatch):
    weight, x = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3)
    rows, matrix = _TiedEmbedding.apply(weight, torch.tensor([4, 1, 4, 0]))
    monkeypatch.setattr(torch.Tensor, "clone", None)
    for product in (F.linear, linear):
        loss = product(x, matrix).square().sum() + rows.sum()
        torch.autograd.grad(loss, weight, retain_graph=True)
