import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from module_cases import assert_model_no_worse, outputs_and_gradients

from slimkernels.dispatch import use_backend
from slimkernels.models.block import Block, Places, Wanted
from slimkernels.models.cache import LayerCache
from slimkernels.models.embedding import Embedding, _TiedEmbedding
from slimkernels.ops.linear import linear
from slimkernels.testing import assert_no_worse

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
        (
            {"wanted": WANTED, "cu_seqlens": ENDS, "places": Places(turns=(1, 2, 3))},
            "places must be none with wanted",
        ),
        ({"cache": LayerCache(None)}, "cache must come with cu_seqlens and without wanted"),
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
        rows, matrix = _TiedEmbedding.apply(weight, ids, weight.dtype)
        # Not linear, so that second derivatives are not zero.
        results = (rows.sin(), (matrix @ matrix.T).sin())
        return {"both": results, "rows": results[0], "matrix": results[1]}[used]

    assert torch.autograd.gradcheck(call, (weight,))
    assert torch.autograd.gradgradcheck(call, (weight,))


class PassedOn(torch.autograd.Function):
    """The identity, which gives its gradient on as another tensor of the same memory."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy.detach()


@pytest.mark.parametrize("product", [F.linear, linear])
def test_tied_embedding_writes_no_gradient_that_others_hold(product):
    weight, x = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3)
    ids, dy = torch.tensor([4, 1, 4, 0]), torch.randn(4, 6)
    (expected,) = torch.autograd.grad(product(x, weight), weight, dy)

    def call(keep=None, pass_on=lambda matrix: matrix, keep_rows=None):
        """What arrived for the matrix, by asking for it where no hook keeps it."""
        rows, matrix = _TiedEmbedding.apply(weight, ids, weight.dtype)
        last = pass_on(matrix)
        if keep is not None:
            last.register_hook(keep)
        if keep_rows is not None:
            rows.register_hook(keep_rows)
        wanted = (weight, matrix) if keep is None else (weight,)
        return torch.autograd.grad((rows.sum(), product(x, last)), wanted, (None, dy))[-1]

    assert torch.equal(call(), expected)
    kept, others = [], []
    call(keep=kept.append)
    call(keep=lambda dmatrix: kept.append(dmatrix.detach()))
    call(keep=kept.append, keep_rows=others.append)
    call(keep=kept.append, pass_on=PassedOn.apply)
    for dmatrix in kept:
        assert torch.equal(dmatrix, expected)
    assert len(kept) == 4


def test_tied_embedding_writes_no_gradient_that_was_given():
    weight = torch.randn(6, 3, requires_grad=True)
    rows, matrix = _TiedEmbedding.apply(weight, torch.tensor([4, 1, 4, 0]), weight.dtype)
    given = torch.ones(18)
    torch.autograd.grad((rows.sum(), matrix.view(-1)), weight, (None, given))
    assert torch.equal(given, torch.ones(18))


@pytest.mark.parametrize("used", ["both", "rows", "matrix"])
def test_tied_embedding_under_autocast_has_the_gradients_of_two_uses(used):
    weight, x = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3)
    ids, drows, dy = torch.tensor([4, 1, 4, 0]), torch.randn(4, 3), torch.randn(4, 6).bfloat16()

    def gradient(rows, matrix):
        with torch.autocast("cpu", torch.bfloat16):
            y = F.linear(x, matrix)
        pairs = {"both": ((rows, y), (drows, dy)), "rows": (rows, drows), "matrix": (y, dy)}
        return torch.autograd.grad(*(pairs[used][0], weight), pairs[used][1])[0]

    rows, matrix = _TiedEmbedding.apply(weight, ids, torch.bfloat16)
    assert rows.dtype == torch.float32 and matrix.dtype == torch.bfloat16
    expected = gradient(F.embedding(ids, weight), weight)
    assert expected.dtype == torch.float32
    assert_no_worse(gradient(rows, matrix), expected, expected.double())


def test_the_table_is_in_autocasts_dtype_where_it_is_multiplied(config):
    embedding, ids = Embedding(config), torch.zeros(3, dtype=torch.int64)
    for multiplies in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            table = embedding(ids, ids, ids, multiplies=multiplies).table
        assert table.dtype == (torch.bfloat16 if multiplies else torch.float32)
        assert embedding(ids, ids, ids, multiplies=multiplies).table.dtype == torch.float32
