"""Attention, masks, packing and logits inside Hugging Face's models."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import pickle
import sys

import pytest
import torch
from hf_families import FAMILIES, LENGTHS, B, L, V, masked, tokens

import slimkernels
from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks
from transformers.models.llama.modeling_llama import eager_attention_forward as plain

from slimkernels.integrations import (
    _hf_attention,
    _hf_mask,
    _swaps_huggingface,
    huggingface,
)
from slimkernels.integrations._hf_logits import LazyLogits
from slimkernels.integrations._hf_twins import fingerprint
from slimkernels.nn import _torchs_own

REAL = torch.arange(L) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def bert():
    return FAMILIES["bert-mlm"].make().eval()


@pytest.fixture
def replaced(bert):
    model = copy.deepcopy(bert)
    slimkernels.replace(model)
    return model


def _three(model, batch, implementation="sdpa"):
    """Last hidden states: with slimkernels' attention, with `implementation`, and in float64."""
    results = []
    for name, dtype in (("slimkernels", None), (implementation, None), ("eager", torch.float64)):
        copied = copy.deepcopy(model).to(dtype or torch.float32)
        copied.set_attn_implementation(name)
        results.append(copied(**batch, use_cache=False).last_hidden_state.detach())
    return results


def _masks():
    batch = tokens()
    ids = batch["input_ids"]
    yield "right", batch, REAL
    yield "left", {n: t.flip(1) for n, t in batch.items()}, REAL.flip(1)
    yield "none", {"input_ids": ids}, torch.ones_like(REAL)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0], [*range(11)], [0] * 11])
    yield "packed", {"input_ids": ids, "position_ids": positions}, torch.ones_like(REAL)
    seen = torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(2)) < 0.7
    seen |= torch.eye(L, dtype=torch.bool)
    yield "own", {"input_ids": ids, "attention_mask": seen}, torch.ones_like(REAL)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind, batch, real", list(_masks()), ids=[kind for kind, *_ in _masks()])
def test_every_kind_of_mask_is_obeyed(kind, batch, real, window):
    family = FAMILIES["mistral"]
    model = FAMILIES["mistral"].make().model.eval()
    assert family.config["sliding_window"] == 4
    model.config.sliding_window = window
    if kind == "own":  # eager adds its mask
        batch = {**batch, "attention_mask": torch.where(batch["attention_mask"], 0.0, -1e9)}
        model.config.sliding_window = None
    three = _three(model, {n: t.clone() for n, t in batch.items()})
    assert_no_worse(*(t[real] for t in three), floor=1e-6)


def test_masks_carry_their_meaning():
    """Without it the numbers would be right, and nothing skipped."""
    patterns = []

    def record(module, query, key, value, attention_mask, **kwargs):
        patterns.append(_hf_mask.pattern_of(attention_mask))
        return attention(module, query, key, value, attention_mask, **kwargs)

    attention = _hf_attention.attention
    from transformers import AttentionInterface

    model = FAMILIES["mistral"].make().model.eval()
    model.set_attn_implementation("slimkernels")
    AttentionInterface.register("slimkernels", record)
    try:
        for _, batch, _ in list(_masks())[:4]:
            model(**batch, use_cache=False)
    finally:
        AttentionInterface.register("slimkernels", attention)
    right, left, none, packed = patterns[::2]
    assert right.window == (3, 0) and right.lengths == LENGTHS
    assert left is None  # padding on the left is no length
    assert none.window == (3, 0) and none.lengths is None
    assert packed.cu_seqlens.tolist() == [0, 4, 10, 11, 22, *range(23, 34)]


def test_sequences_named_by_cu_seq_lens_see_only_themselves():
    model = FAMILIES["llama"].make().model.eval()
    ids = tokens()["input_ids"]
    boundaries = torch.tensor([0, 4, 11], dtype=torch.int32)
    positions = torch.tensor([[*range(4), *range(7)]])
    names = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    expected = model(ids[:1], position_ids=positions, use_cache=False).last_hidden_state
    model.set_attn_implementation("slimkernels")
    actual = model(ids[:1], position_ids=positions, **names).last_hidden_state
    torch.testing.assert_close(actual, expected)
    one = model(ids[:1, :4]).last_hidden_state
    torch.testing.assert_close(actual[:, :4], one)


def test_another_mask_interface_gets_its_own_mask(monkeypatch):
    def sdpa_mask(batch_size, cache_position, kv_length, kv_offset=0):
        raise NotImplementedError

    assert _hf_mask.mask_function() is _hf_mask.mask
    monkeypatch.setattr(_hf_mask.masking_utils, "sdpa_mask", sdpa_mask)
    assert _hf_mask.mask_function() is sdpa_mask


def _heads(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def _module(**attributes):
    module = torch.nn.Module()
    for name, value in {"num_key_value_groups": 2, "is_causal": True, **attributes}.items():
        setattr(module, name, value)
    return module.eval()


def test_sinks_softcap_and_position_bias():
    mask = torch.zeros(2, 1, 5, 7).masked_fill(torch.rand(2, 1, 5, 7) < 0.3, -1e9)
    sinks = torch.randn(4)
    module = _module(sinks=sinks)
    truth = with_sinks(_module(sinks=sinks.double()), *_heads(torch.float64), mask.double(), 0.3)[0]
    eager = with_sinks(module, *_heads(), mask, 0.3)[0]
    ours = _hf_attention.attention(module, *_heads(), mask, scaling=0.3, s_aux=sinks)[0]
    assert_no_worse(ours, eager, truth, floor=1e-6)

    bias = torch.randn(1, 4, 5, 7)
    expected = plain(_module(), *_heads(), mask + bias, 0.3)[0]
    ours = _hf_attention.attention(_module(), *_heads(), mask, scaling=0.3, position_bias=bias)[0]
    torch.testing.assert_close(ours, expected)
    seen = mask == 0
    ours = _hf_attention.attention(_module(), *_heads(), seen, scaling=0.3, position_bias=bias)[0]
    torch.testing.assert_close(ours, expected)


def test_rows_that_see_nothing():
    """0 under a mask of bools, the mean of the values under one of the lowest number."""
    query, key, value = _heads()
    seen = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    seen[:, :, 2] = False
    y = _hf_attention.attention(_module(), query, key, value, seen)[0]
    assert (y[:, 2] == 0).all() and (y[:, 1] != 0).all()
    added = torch.zeros(2, 1, 5, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    y = _hf_attention.attention(_module(), query, key, value, added)[0]
    mean = value.repeat_interleave(2, 1).mean(2)
    torch.testing.assert_close(y[:, 2], mean)


def test_a_cache_longer_than_the_prompt_and_dropout_outside_training():
    query, key, value = _heads()
    y = _hf_attention.attention(_module(), query, key, value, None, dropout=0.5)[0]
    causal = torch.ones(5, 7, dtype=torch.bool).tril()
    expected = _hf_attention.attention(_module(), query, key, value, causal[None, None])[0]
    torch.testing.assert_close(y, expected)


def test_attention_weights_are_refused(replaced):
    with pytest.raises(ValueError, match='set_attn_implementation."eager".'):
        replaced(**tokens(), output_attentions=True)


@pytest.mark.parametrize("version, found", [("4.57.1", "found 4.57.1"), (None, "found none")])
def test_another_transformers_is_refused(monkeypatch, version, found):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    spec = importlib.util.find_spec("slimkernels.integrations.huggingface")
    with pytest.raises(ImportError, match=f"needs transformers 5 or newer.*{found}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_under_another_transformers_its_modules_are_left(monkeypatch):
    for name in ("huggingface", "_swaps_huggingface"):
        monkeypatch.delitem(sys.modules, f"slimkernels.integrations.{name}")
        monkeypatch.delattr(slimkernels.integrations, name)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.57.1")
    report = slimkernels.replace(FAMILIES["bert-cls"].make())
    assert {row.kind for row in report.swapped} == {"torch.nn.LayerNorm", "torch.nn.Dropout"}
    (model,) = [row for row in report.left if row.path == ""]
    assert "needs transformers 5 or newer; found 4.57.1" in model.detail


def test_padding_is_not_computed_and_comes_back_as_zeros(bert, replaced):
    """Layers see the real tokens; what looks at hidden states sees them padded."""
    sizes = []
    linear = replaced.bert.encoder.layer[0].intermediate.dense
    forward = linear.forward
    linear.forward = lambda x: sizes.append(tuple(x.shape)) or forward(x)
    output = replaced.bert(**tokens()).last_hidden_state
    assert sizes == [(1, sum(LENGTHS), 32)]
    assert (output[~REAL] == 0).all()

    expected = bert.bert(**tokens(), output_hidden_states=True).hidden_states
    actual = replaced.bert(**tokens(), output_hidden_states=True).hidden_states
    assert sizes[-1] == (B, L, 32)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[REAL], e[REAL])

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
    expected = bert.bert(**left).last_hidden_state
    torch.testing.assert_close(replaced.bert(**left).last_hidden_state, expected)
    assert sizes[-1] == (B, L, 32)


@pytest.mark.parametrize("lengths", [(5, 3), (8, 5)])
def test_small_batches_in_evaluation_too(bert, replaced, monkeypatch, lengths):
    """Where transformers' own code runs between the packing; as many tokens as a row has places."""
    monkeypatch.setattr(_torchs_own, "MIN_ELEMENTS", 1 << 20)
    ids = tokens()["input_ids"][:2, :8]
    seen = torch.arange(8) < torch.tensor(lengths)[:, None]
    batch = {"input_ids": ids, "attention_mask": seen.long()}
    with torch.no_grad():
        expected, actual = (model(**batch).logits for model in (bert, replaced))
    torch.testing.assert_close(actual[seen], expected[seen])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(replaced, reentrant):
    replaced.train()
    expected = replaced(**masked()).loss
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in replaced.named_parameters()}
    replaced.zero_grad()
    replaced.gradient_checkpointing_enable({"use_reentrant": reentrant})
    replaced.bert.embeddings.register_forward_hook(lambda module, args, out: out)
    loss = replaced(**masked()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for n, p in replaced.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], msg=n)


def test_restore_leaves_no_trace(bert):
    model = copy.deepcopy(bert)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    classes = {n: type(m) for n, m in model.named_modules()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    implementation = model.config._attn_implementation
    slimkernels.replace(model)
    model.train()(**masked()).loss.backward()
    slimkernels.restore(model)
    model.eval()
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(model(**tokens()).logits, bert(**tokens()).logits)


def test_copies_pickles_and_directories(tmp_path):
    bert = FAMILIES["bert-mlm"].make().eval()
    replaced = slimkernels.replace(bert, inplace=False).model
    expected = replaced(**tokens()).logits
    for copied in (copy.deepcopy(replaced), pickle.loads(pickle.dumps(replaced))):
        assert torch.equal(copied(**tokens()).logits, expected)
        assert type(copied.bert.encoder) is type(replaced.bert.encoder)
        slimkernels.restore(copied)
        assert torch.equal(copied(**tokens()).logits, bert(**tokens()).logits)
    replaced.save_pretrained(tmp_path)
    loaded = type(bert).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**tokens()).logits, bert(**tokens()).logits)


def test_compiles_without_a_break(bert, replaced):
    expected = replaced(**tokens()).logits
    with torch.no_grad():
        actual = torch.compile(replaced, fullgraph=True, backend="eager")(**tokens()).logits
    torch.testing.assert_close(actual[REAL], expected[REAL])


def test_logits_are_computed_when_read(replaced):
    model = replaced.train()
    output = model(**masked())
    logits = output.logits
    assert isinstance(logits, LazyLogits) and logits.shape == (B, L, V)
    assert logits._source.value is None, "the loss needed them"
    expected = model.cls(model.bert(**tokens()).last_hidden_state).detach() + 0
    assert type(expected) is torch.Tensor
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert logits.tolist() == expected.tolist()
    assert torch.equal(logits.detach().float().cpu(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(logits.detach())), expected)
    assert f"{logits[0, 0, 0].item():.6f}" == f"{expected[0, 0, 0].item():.6f}"

    out = model(**masked())
    out.loss.backward()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="read them before it"):
        out.logits.argmax()
    huggingface.keep_logits(model)
    assert type(model(**masked()).logits) is torch.Tensor
    slimkernels.restore(model)


@pytest.mark.parametrize("name", ["distilbert", "gpt2", "t5", "bart", "whisper", "deberta-v2"])
def test_losses_do_without_logits(name):
    family = FAMILIES[name]
    model = family.make().train()
    slimkernels.replace(model)
    output = model(**family.inputs())
    assert output.logits._source.value is None and output.loss.isfinite()


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


def _own_loss(logits):
    return logits.log_softmax(-1)[REAL].square().mean()


def _written(logits):
    logits[..., 3] = -5.0
    return torch.nn.functional.cross_entropy(logits.view(-1, V), masked()["labels"].view(-1))


def _hooked(logits):
    logits.register_hook(lambda gradient: 2 * gradient)
    return torch.nn.functional.cross_entropy(logits.view(-1, V), masked()["labels"].view(-1))


@pytest.mark.parametrize("loss", [_own_loss, _written, _hooked])
def test_gradients_flow_through_logits_that_are_read(bert, replaced, loss):
    results = []
    for model in (copy.deepcopy(bert).train(), replaced.train()):
        value = loss(model(**tokens()).logits)
        value.backward()
        results.append([value.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_logits_written_after_they_were_reshaped_are_refused(replaced):
    logits = replaced.train()(**tokens()).logits
    flat = logits.view(-1, V)
    logits[..., 3] = -5.0
    with pytest.raises(RuntimeError, match="make those after the writing"):
        torch.nn.functional.cross_entropy(flat, masked()["labels"].view(-1))


def test_trainer_is_unchanged(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    batch = masked()
    rows = [{n: t[i] for n, t in batch.items()} for i in range(B)] * 2
    losses = []
    for wanted in (False, True):
        model = FAMILIES["bert-mlm"].make()
        if wanted:
            slimkernels.replace(model)
        options = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1}
        arguments = TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, save_strategy="no", seed=0, **options
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses.append([r["loss"] for r in trainer.state.log_history if "loss" in r])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    torch.testing.assert_close(*map(torch.tensor, losses))


@pytest.mark.parametrize("of", _swaps_huggingface._LAYERS, ids=lambda of: of[1])
def test_layers_are_the_code_that_ours_were_written_for(of):
    """If not: read the class anew, change ours, and then the fingerprint."""
    assert fingerprint(*of) == _swaps_huggingface._LAYERS[of][1]


def test_other_code_is_left(monkeypatch):
    """A later version's, or that of a class of the same name: the report says so."""
    of = "bert", "BertSelfOutput"
    ours, _ = _swaps_huggingface._LAYERS[of]
    monkeypatch.setitem(_swaps_huggingface._LAYERS, of, (ours, "another"))
    report = slimkernels.replace(FAMILIES["bert-cls"].make())
    left = [row.detail for row in report.left if row.kind.endswith("BertSelfOutput")]
    assert len(left) == 2 and all("computes it otherwise" in detail for detail in left)


def test_a_subclass_is_left():
    bert = FAMILIES["bert-cls"].make()

    class Own(type(bert.bert.encoder.layer[0].output)):
        def forward(self, hidden_states, input_tensor):
            return super().forward(hidden_states, input_tensor) * 2

    bert.bert.encoder.layer[0].output.__class__ = Own
    report = slimkernels.replace(bert)
    assert type(bert.bert.encoder.layer[0].output) is Own
    assert "bert.encoder.layer.0.output" in [row.path for row in report.left]
