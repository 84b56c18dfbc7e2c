"""What replace() and restore() do to Hugging Face's models, and what those still do after it."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import inspect
import pickle
import sys

import pytest
import torch
from hf_families import FAMILIES, REAL, B, masked, tokens

import slimkernels
from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")
from transformers import DynamicCache, EncoderDecoderCache

from slimkernels.integrations import _swaps_huggingface
from slimkernels.integrations._hf_twins import fingerprint


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
    with torch.no_grad():
        compiled = torch.compile(replaced, fullgraph=True, backend="eager")
        models = compiled, bert, copy.deepcopy(bert).double()
        assert_no_worse(*(model(**tokens()).logits[REAL] for model in models))


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


_TABLES = ("_LAYERS", "_PACKING", "_ATTENTIONS", "_STACKS")


@pytest.mark.parametrize("table", _TABLES)
def test_classes_are_the_code_that_ours_were_written_for(table):
    """If not: read the class anew, change ours, and then the fingerprint."""
    rows = getattr(_swaps_huggingface, table)
    assert {of: fingerprint(*of) for of in rows} == {of: row[0] for of, row in rows.items()}


@pytest.mark.parametrize("table", _TABLES)
def test_other_code_is_left(monkeypatch, table):
    """A later version's, or that of a class of the same name: the report says so."""
    rows = {of: ("another", *row[1:]) for of, row in getattr(_swaps_huggingface, table).items()}
    monkeypatch.setattr(_swaps_huggingface, table, rows)
    report = slimkernels.replace(FAMILIES["bert-cls"].make())
    left = [row for row in report.left if "computes it otherwise" in row.detail]
    names = {row.kind.rpartition(".")[2] for row in left}
    if table == "_LAYERS":
        assert names == {"BertEmbeddings", "BertSelfOutput", "BertIntermediate", "BertOutput"}
    else:
        assert "BertEncoder" in {row.kind.rpartition(".")[2] for row in report.left}


def test_a_subclass_is_left():
    bert = FAMILIES["bert-cls"].make()

    class Own(type(bert.bert.encoder.layer[0].output)):
        def forward(self, hidden_states, input_tensor):
            return super().forward(hidden_states, input_tensor) * 2

    bert.bert.encoder.layer[0].output.__class__ = Own
    report = slimkernels.replace(bert)
    assert type(bert.bert.encoder.layer[0].output) is Own
    assert "bert.encoder.layer.0.output" in [row.path for row in report.left]


def test_the_report_says_of_stacks_what_they_do():
    report = slimkernels.replace(FAMILIES["t5"].make())
    said = {row.path: row.detail for row in report.swapped}
    assert "padding is left out" in said["encoder"]
    assert "padding" not in said["decoder"] and "decoder.block.0" not in said


@pytest.mark.parametrize(
    "name, path", [("llama", "model.layers.0"), ("bart", "model.decoder.layers.0")]
)
def test_the_cache_has_a_former_name(name, path):
    """Under which a layer's own caller may give it; what it holds must not be forgotten."""
    model = FAMILIES[name].make().eval()
    double, replaced = copy.deepcopy(model).double(), copy.deepcopy(model)
    slimkernels.replace(replaced)
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for each in (replaced, model, double):
        caches = DynamicCache(), DynamicCache()
        cache = EncoderDecoderCache(*caches) if name == "bart" else caches[0]
        x, given = hidden.to(each.dtype), {"past_key_values": cache}
        if name == "llama":
            given["position_embeddings"] = x.new_ones(1, 2, 8), x.new_zeros(1, 2, 8)
        layer = each.get_submodule(path)
        results.append(torch.cat([layer(part, **given) for part in x.split(2, 1)], 1))
        assert cache.get_seq_length() == 4
    assert_no_worse(*results)


def test_what_a_model_takes_is_still_to_be_read():
    """By generate() and the Trainer, which drop what a forward does not name."""
    model = FAMILIES["t5"].make()
    modules = {n: inspect.signature(m.forward) for n, m in model.named_modules()}
    slimkernels.replace(model)
    assert all(
        inspect.signature(m.forward) == modules[n]
        for n, m in model.named_modules()
        if type(m).__module__.startswith("transformers.")
    )


class Quantised(torch.Tensor):
    """A weight of eight bits that only F.linear can take, as torchao's are."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.levels = (weight / self.scale).round().to(torch.int8)

    def wide(self):
        return self.levels * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            args = [a.wide() if isinstance(a, cls) else a for a in args]
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].wide())
        raise NotImplementedError(str(function))


def test_quantised_weights_are_left_to_torch(monkeypatch):
    from slimkernels.backends.cpu import linear

    monkeypatch.setattr(linear, "_IS_AMD", True)  # where the op has a kernel for plain weights
    monkeypatch.setattr(linear, "MIN_PRODUCT", 0)
    model = FAMILIES["bert-mlm"].make().train()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            weight = Quantised(module.weight.detach())
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    expected = model(**masked()).logits
    slimkernels.replace(model)
    torch.testing.assert_close(model(**masked()).logits[REAL], expected[REAL])
