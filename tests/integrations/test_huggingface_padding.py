"""Unpadded execution inside Hugging Face's padded models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hf_configs import GPT2
from hf_families import FAMILIES, LENGTHS, REAL, B, L, answered, causal, masked, tagged, tokens
from module_cases import assert_model_no_worse
from torch.distributed.fsdp import fully_shard

import slimkernels
from slimkernels.nn import _torchs_own
from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")
from transformers.masking_utils import create_bidirectional_mask


def _assert_right(model, replaced, batch):
    """Loss and gradients of a replaced model."""
    runs = []
    for each in (replaced, model, copy.deepcopy(model).double()):
        each.zero_grad()
        loss = each(**batch).loss
        loss.backward()
        gradients = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        runs.append({"loss": loss.detach()} | gradients)
    assert_model_no_worse(*runs)


def test_padding_is_not_computed_and_comes_back_as_zeros(bert, replaced):
    """Layers see the real tokens; what looks at hidden states sees them padded."""
    sizes = []
    linear = replaced.bert.encoder.layer[0].intermediate.dense
    forward = linear.forward
    linear.forward = lambda x: sizes.append(tuple(x.shape)) or forward(x)
    output = replaced.bert(**tokens()).last_hidden_state
    assert sizes == [(1, sum(LENGTHS), 32)]
    assert (output[~REAL] == 0).all()

    models = replaced.bert, bert.bert, copy.deepcopy(bert.bert).double()
    hidden = (model(**tokens(), output_hidden_states=True).hidden_states for model in models)
    for three in zip(*hidden, strict=True):
        assert_no_worse(*(t[REAL] for t in three))
    assert sizes[-1] == (B, L, 32)

    shapes = []
    layer = replaced.bert.encoder.layer[1]
    hook = layer.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    replaced.bert(**tokens())
    hook.remove()
    assert shapes == [(B, L, 32)]

    layer._compiled_call_impl = layer._call_impl  # as after layer.compile()
    replaced.bert(**tokens())
    assert sizes[-1] == (B, L, 32)
    layer._compiled_call_impl = None

    left = {n: t.flip(1) for n, t in tokens().items()}
    assert_no_worse(*(model(**left).last_hidden_state for model in models))
    assert sizes[-1] == (B, L, 32)


@pytest.mark.parametrize("lengths", [(5, 3), (8, 5)])
def test_small_batches_in_evaluation_too(bert, replaced, monkeypatch, lengths):
    """Where transformers' own code runs between the packing; as many tokens as a row has places."""
    monkeypatch.setattr(_torchs_own, "MIN_ELEMENTS", 1 << 20)
    ids = tokens()["input_ids"][:2, :8]
    seen = torch.arange(8) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": ids, "attention_mask": seen.long()}
    with torch.no_grad():
        models = replaced, bert, copy.deepcopy(bert).double()
        assert_no_worse(*(model(**batch).logits[seen] for model in models))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert-mlm", "llama"])
def test_activation_checkpointing(name, reentrant, packings):
    model = FAMILIES[name].make().train()
    batch = {**causal(), "use_cache": False} if name == "llama" else masked()
    replaced = slimkernels.replace(model, inplace=False).model
    replaced.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _assert_right(model, replaced, batch)
    assert bool(packings) == (not reentrant)


@pytest.mark.parametrize("case", ["layers", "parts of them", "watched"])
@pytest.mark.parametrize(
    "name, layers, part", [("gpt2", "transformer.h", "attn"), ("t5", "encoder.block", "layer.0")]
)
def test_sharded_layers_are_packed(name, layers, part, case, mesh, packings):
    family = FAMILIES[name]
    model = family.make().train()
    batch = family.inputs() | ({"use_cache": False} if name == "gpt2" else {})
    slimkernels.replace(model)
    if case != "layers":  # a hook of somebody else's
        model.get_submodule(layers)[0].register_forward_hook(lambda *_: None)
    expected = model(**batch).loss
    expected.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert bool(packings) == (case == "layers")

    sharded = family.make().train()
    for layer in sharded.get_submodule(layers):
        fully_shard(layer.get_submodule(part if case == "parts of them" else ""), mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    slimkernels.replace(sharded)
    if case == "watched":
        layer.register_forward_hook(lambda *_: None)
    packings.clear()
    with warnings.catch_warnings():
        # Of a view that comes out, as out of the others of transformers' own modules here.
        is_theirs = (name, case) not in [("gpt2", "layers"), ("gpt2", "watched")]
        warnings.simplefilter("ignore" if is_theirs else "error", UserWarning)
        loss = sharded(**batch).loss
    loss.backward()
    assert bool(packings) == (case == "layers")
    assert torch.equal(loss, expected)
    for n, p in sharded.named_parameters():
        assert torch.equal(p.grad.full_tensor(), gradients[n]), n


def test_positions_of_a_packed_bias_are_those_in_the_sequences(monkeypatch):
    """The bias would be right between all tokens, too, and as large as their number's square."""
    family = FAMILIES["t5"]
    model = family.make()
    slimkernels.replace(model)
    attention, sizes = model.encoder.block[0].layer[0].SelfAttention, []
    compute = attention.compute_bias
    monkeypatch.setattr(
        attention,
        "compute_bias",
        lambda *args, **kw: sizes.append(args[:2]) or compute(*args, **kw),
    )
    model(**family.inputs())
    assert sizes == [(L, L)]


@pytest.mark.parametrize("name", ["bert-mlm", "bert-tokens", "llama"])
def test_labels_where_padding_is_keep_it(name, packings):
    """As programs have them that take a copy of the ids for labels."""
    model = FAMILIES[name].make().train()
    batch = {**tokens(), "labels": tokens()["input_ids"] % 2}
    batch |= {"use_cache": False} if name == "llama" else {}
    replaced = slimkernels.replace(model, inplace=False).model
    _assert_right(model, replaced, batch)
    assert not packings
    slimkernels.restore(replaced)
    assert type(replaced) is type(model)


def test_labels_that_are_shifted_already_are_looked_at_too(packings):
    model = FAMILIES["llama"].make().train()
    replaced = slimkernels.replace(model, inplace=False).model
    batch = {**causal(), "use_cache": False}
    labels = batch["labels"].roll(-1, 1)
    for given, packs in ((labels.masked_fill(~REAL, -100), True), (labels.clamp(min=0), False)):
        packings.clear()
        _assert_right(model, replaced, {**batch, "shift_labels": given})
        assert bool(packings) == packs


@pytest.mark.parametrize("name", ["bert-tokens", "llama"])
def test_a_loss_of_ones_own_may_read_all_logits(name, packings):
    def with_z_loss(logits, labels, *args, **kwargs):
        cross_entropy = torch.nn.functional.cross_entropy(logits.mT, labels)
        return cross_entropy + 0.1 * logits.logsumexp(-1).square().mean()

    model = FAMILIES[name].make().train()
    batch = {**causal(), "use_cache": False} if name == "llama" else tagged()
    model.loss_function = with_z_loss
    _assert_right(model, slimkernels.replace(model, inplace=False).model, batch)
    assert not packings


def test_a_head_may_take_the_last_place(packings):
    """Which is padding's, if nobody says which it is."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**GPT2)).eval()
    replaced = slimkernels.replace(model, inplace=False).model
    batch = {**causal(), "use_cache": False}
    outputs = (m(**batch) for m in (replaced, model, copy.deepcopy(model).double()))
    assert_model_no_worse(*({"mc": y.mc_logits, "lm": y.logits} for y in outputs))
    assert not packings


@pytest.mark.parametrize("parts_first", [False, True])
def test_question_answering_reads_padding(parts_first, packings):
    model = FAMILIES["bert-qa"].make().train()
    replaced = copy.deepcopy(model)
    if parts_first:
        slimkernels.replace(replaced.bert)
    report = slimkernels.replace(replaced)
    assert "padding stays, since the head reads it" in report.swapped[0].detail
    _assert_right(model, replaced, answered())
    assert not packings


DECODERS = [*("gpt2", "gpt-neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")]


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_leave_padding_out_of_a_loss(name, packings):
    model = FAMILIES[name].make().train()
    replaced = slimkernels.replace(model, inplace=False).model
    _assert_right(model, replaced, {**causal(), "use_cache": False})
    assert packings


def test_decoders_keep_padding_where_it_may_be_read(packings):
    """Without labels by what looks at the last places, with a cache by what goes on from there."""
    model = FAMILIES["llama"].make().eval()
    models = slimkernels.replace(model, inplace=False).model, model, copy.deepcopy(model).double()
    assert_no_worse(*(m(**tokens(), use_cache=False).logits for m in models))
    assert_no_worse(*(m(**causal()).cache.layers[1].keys for m in models))
    assert not packings


def test_a_mask_may_serve_several_times(bert, replaced):
    """What remembers the packing is the mask."""
    batch = tokens()
    hidden = bert.bert.embeddings(batch["input_ids"])
    mask = create_bidirectional_mask(replaced.config, hidden, batch["attention_mask"])
    encoder = replaced.bert.encoder
    first, second = (encoder(hidden, mask).last_hidden_state for _ in range(2))
    assert first.shape == (B, L, 32) and torch.equal(first, second)
    alone = encoder.layer[0](hidden, mask)
    assert alone.shape == (B, L, 32)
    hook = encoder.layer[1].register_forward_hook(lambda *_: None)
    padded = encoder(hidden, mask).last_hidden_state
    hook.remove()
    eager, truth = (
        copy.deepcopy(bert.bert.encoder).to(dtype)(hidden.to(dtype), mask).last_hidden_state[REAL]
        for dtype in (torch.float32, torch.float64)
    )
    assert_no_worse(padded[REAL], eager, truth)
    assert_no_worse(first[REAL], eager, truth)
    assert (padded[~REAL] != 0).any()


def test_torch_func_sees_no_packing(bert, replaced, packings):
    parameters = dict(replaced.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(replaced, parameters, kwargs=masked()).loss

    gradients = torch.func.grad(loss)(parameters)
    results = [{n: g.detach() for n, g in gradients.items()}]
    for model in (bert, copy.deepcopy(bert).double()):
        model.zero_grad()
        model(**masked()).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert_model_no_worse(*results)
