"""Folders of Hugging Face's BERT: read, computed, written, and read by transformers again."""

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from module_cases import assert_model_no_worse
from pretrained_cases import assert_written_as_read, randomised, results

from slimkernels import models
from slimkernels.models import files
from slimkernels.testing import assert_no_worse

transformers = pytest.importorskip("transformers")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far", "##s", "##ly", ",", "."]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
TEXTS = ["The cats sat on a mat, and the dog ran far.", "Dog, ran!", "on the mat"]
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
HEADS = [
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder a head, as transformers writes it, with every parameter random."""
    root = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    for head in [*HEADS, "BertForPreTraining"]:
        labels = {"num_labels": 3} if head == "BertForTokenClassification" else {}
        theirs = getattr(transformers, head)(transformers.BertConfig(**SIZES, **labels))
        randomised(theirs).save_pretrained(root / head)
        (root / head / "vocab.txt").write_text("\n".join(TOKENS) + "\n")
    return root


@pytest.fixture
def inputs(folders):
    tokenizer = models.AutoTokenizer.from_pretrained(folders / "BertModel")
    return tokenizer(TEXTS, return_tensors="pt", padding=True)


def labels_of(head, inputs):
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if head == "BertForMaskedLM":
        return {"labels": ids.where((mask == 1) & (ids % 3 == 0), -100)}
    if head == "BertForSequenceClassification":
        return {"labels": torch.tensor([1, 0, 1])}
    if head == "BertForTokenClassification":
        return {"labels": (ids % 3).where(mask == 1, -100)}
    if head == "BertForQuestionAnswering":
        return {
            "start_positions": torch.tensor([1, 0, 50]),
            "end_positions": torch.tensor([4, 2, 3]),
        }
    return {}


def outputs(model, inputs, labels):
    """The loss, and what is given for real tokens; padding is no answer in theirs either."""
    mask = inputs["attention_mask"].bool()
    y = model(**inputs, **labels)
    names = "loss", "logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output"
    found = {n: getattr(y, n) for n in names if getattr(y, n, None) is not None}
    if "start_logits" in found:
        for name in ("start_logits", "end_logits"):
            found[name] = found[name].masked_fill(~mask, -torch.inf)
        both = zip((found["start_logits"], found["end_logits"]), labels.values(), strict=True)
        length = mask.shape[1]  # a place that is no column is left out
        losses = [F.cross_entropy(x, at.clamp(max=length), ignore_index=length) for x, at in both]
        if not isinstance(model, models.BertForQuestionAnswering):
            found["loss"] = sum(losses) / 2
    found = {n: y[mask] if y.shape[:2] == mask.shape else y for n, y in found.items()}
    return results(model, found)


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_hugging_faces(folders, inputs, head):
    ours = getattr(models, head).from_pretrained(folders / head)
    theirs = getattr(transformers, head).from_pretrained(folders / head)
    labels = labels_of(head, inputs)
    actual, eager = outputs(ours, inputs, labels), outputs(theirs, inputs, labels)
    truth = outputs(theirs.double(), inputs, labels)
    assert not ours.training
    assert_model_no_worse(actual, eager, truth)
    padding = inputs["attention_mask"] == 0
    nothing = -torch.inf if head == "BertForQuestionAnswering" else 0.0
    for y in ours(**inputs):
        if y is not None and y.shape[:2] == padding.shape:
            assert (y[padding] == nothing).all()


def test_the_readmes_example_is_the_published_one(folders):
    """Word for word, but for the import, with the same predictions."""
    text = (Path(__file__).parents[2] / "README.md").read_text()
    _, example = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    given = {"path": folders / "BertForSequenceClassification", "texts": TEXTS}
    ours, theirs = dict(given), dict(given)
    exec(example, ours)
    theirs_example = example.replace("slimkernels.models", "transformers")
    exec(theirs_example, theirs)
    assert ours["inputs"].keys() == theirs["inputs"].keys()
    assert all(torch.equal(ours["inputs"][n], t) for n, t in theirs["inputs"].items())
    first, second = (y["model"](**y["inputs"]).logits for y in (ours, theirs))
    truth = theirs["model"].double()(**theirs["inputs"]).logits
    assert_no_worse(first, second, truth)
    assert torch.equal(ours["predictions"], theirs["predictions"])


@pytest.mark.parametrize("head", [*HEADS, "BertForPreTraining"])
def test_transformers_reads_what_we_write(folders, tmp_path, head):
    ours = getattr(models, head).from_pretrained(folders / head)
    assert_written_as_read(transformers, folders / head, ours, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = getattr(models, head).from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(t, ours.state_dict()[n]) for n, t in again.state_dict().items())
    assert not list(tmp_path.glob("*partial*"))


AUTO = [name for name in models.__all__ if name.startswith("AutoModel")]


@pytest.mark.parametrize("name", AUTO)
def test_auto_classes_choose_by_the_folder(folders, name):
    head = name.replace("AutoModel", "Bert") if "For" in name else "BertModel"
    if head not in HEADS:
        with pytest.raises(ValueError, match=f"^{name}.from_pretrained: model_type .*got 'bert'"):
            getattr(models, name).from_pretrained(folders / "BertModel")
        return
    model = getattr(models, name).from_pretrained(folders / head, dtype=torch.float64)
    assert type(model) is getattr(models, head)
    theirs = getattr(transformers, name).from_pretrained(folders / head)
    assert type(model).__name__ == type(theirs).__name__


def test_shards_are_read_and_written(folders, tmp_path):
    """And weights that the folder had in another form are removed."""
    path = folders / "BertModel"
    model = models.BertModel.from_pretrained(path)
    for limit in (7000, None, 9000):
        model.save_pretrained(tmp_path, max_shard_size=limit)
        shards = len(list(tmp_path.glob("model-*")))
        names = {file.name for file in tmp_path.iterdir()}
        assert (shards > 1) == (limit is not None) == (files.INDEX in names)
        assert (files.WEIGHTS in names) == (limit is None)
        largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
        assert limit is None or largest < limit + 3000  # and its header
    expected = files.read_weights(path, "")
    theirs = transformers.BertModel.from_pretrained(tmp_path).state_dict()
    ours = models.BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_a_folder_is_whole_when_writing_fails(folders, tmp_path, monkeypatch):
    model = models.BertModel.from_pretrained(folders / "BertModel")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full)
    with torch.no_grad():
        model.pooler.weight.zero_()
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        ({"num_labels": 0}, ValueError, "num_labels must be an integer >= 1; got 0"),
        ({"num_labels": "2"}, ValueError, "num_labels must be an integer >= 1; got '2'"),
        ({"id2label": ["a", "b"]}, ValueError, "id2label must be a dict of .*; got .'a', 'b'."),
        ({"problem_type": "rank"}, ValueError, "problem_type must be None or .*; got 'rank'"),
        ({"classifier_dropout": "0"}, ValueError, r"classifier_dropout must be a .*; got '0'"),
        ({"dtype": "float32"}, ValueError, "dtype must be a floating torch.dtype or .*'float32'"),
        ({"device": "gpu"}, ValueError, "device must be a torch.device or its name; got 'gpu'"),
        ({"device": "cuda:99"}, ValueError, "device cuda:99 cannot be used: .*"),
        (
            {"num_label": 2},
            TypeError,
            "there is no option num_label; it takes path, dtype, device, num_labels, .*_type",
        ),
    ],
)
def test_a_wrong_option_is_one_sentence(folders, options, error, sentence):
    kind = "BertForSequenceClassification"
    with pytest.raises(error, match=f"^{kind}(.from_pretrained)?: {sentence}$"):
        models.BertForSequenceClassification.from_pretrained(folders / kind, **options)


def test_wrong_labels_are_one_sentence(folders, inputs):
    def refused(head, sentence, **wrong):
        model = getattr(models, head).from_pretrained(folders / head)
        with pytest.raises(ValueError, match=f"^{head}: {sentence}$"):
            model(**inputs, **wrong)

    head, kind = "BertForSequenceClassification", "multi_label_classification"
    sentence = rf"labels must be \(3, 2\) for {kind}, or integers \(3,\) for one class a row; "
    refused(head, sentence + r"got torch.float32 \(3,\)", labels=torch.ones(3))
    refused(head, "labels must be a tensor; got list", labels=[1, 0, 1])
    sentence = r"start_positions and end_positions must be integers \(3,\); got "
    wrong = {"start_positions": torch.ones(3), "end_positions": torch.ones(3)}
    refused("BertForQuestionAnswering", sentence + r"torch.float32 \(3,\)", **wrong)


def test_a_head_that_is_not_there_is_new_and_named(folders):
    with pytest.warns(UserWarning) as record:
        model = models.BertForSequenceClassification.from_pretrained(
            folders / "BertForMaskedLM", num_labels=5
        )
    (warning,) = record
    new, left = str(warning.message).split("; ")
    assert new.endswith(
        "bert.pooler.dense.weight, bert.pooler.dense.bias, classifier.weight, classifier.bias"
    )
    assert "cls.predictions.transform.dense.weight" in left and "bert.encoder" not in left
    assert model.classifier.weight.shape == (5, 32) and len(model.id2label) == 5
    assert 0 < model.classifier.weight.std() < 0.04 and (model.classifier.bias == 0).all()
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())


def test_dtype_is_the_files_or_the_callers(folders, tmp_path):
    path = folders / "BertModel"
    half = models.BertModel.from_pretrained(path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    for model in (half, models.BertModel.from_pretrained(tmp_path, device="cpu")):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_old_files_are_read(folders, tmp_path):
    """pytorch_model.bin, with the first checkpoints' names and constants; what it is not, too."""
    state = files.read_weights(folders / "BertModel", "")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in state.items()
    } | {"embeddings.position_ids": torch.arange(32)[None]}
    (tmp_path / "config.json").write_text((folders / "BertModel" / "config.json").read_text())
    torch.save(old, tmp_path / "pytorch_model.bin")
    model = models.BertModel.from_pretrained(tmp_path)
    expected = models.BertModel.from_pretrained(folders / "BertModel").state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_skipped_logits_cost_nothing_else(folders, inputs):
    ours, theirs = _both(folders / "BertForMaskedLM")
    labels, real = labels_of("BertForMaskedLM", inputs), inputs["attention_mask"].bool()
    skipped = ours(**inputs, **labels, skip_logits=True)
    assert skipped.logits is None
    ys = [model(**inputs, **labels) for model in (ours, theirs, copy.deepcopy(theirs).double())]
    fields = [{"loss": y.loss, "logits": y.logits[real]} for y in ys]
    assert_model_no_worse(fields[0] | {"loss": skipped.loss}, *fields[1:])


def _both(path):
    return (getattr(of, path.name).from_pretrained(path) for of in (models, transformers))


@pytest.mark.parametrize("kind", ["regression", "several classes"])
def test_other_problems_of_classification(folders, inputs, kind):
    ours, theirs = _both(folders / "BertForSequenceClassification")
    labels = torch.rand(3, 2).round()
    if kind == "regression":
        for model in (ours, theirs):
            model.num_labels = 1
            for name in ("weight", "bias"):
                parameter = getattr(model.classifier, name)
                setattr(model.classifier, name, torch.nn.Parameter(parameter[:1].detach()))
        labels = torch.randn(3)
    fields = []
    for model in (ours, theirs, copy.deepcopy(theirs).double()):
        y = model(**inputs, labels=labels.to(model.classifier.weight.dtype))
        fields.append({"loss": y.loss, "logits": y.logits})
    assert_model_no_worse(*fields)


def changed(folder, tmp_path, file, change):
    """A copy of a folder, of which one file's object is changed."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if file == "config.json":
        content = json.loads((folder / file).read_text())
        change(content)
        (tmp_path / file).write_text(json.dumps(content))
    else:
        import safetensors.torch

        state = files.read_weights(folder, "")
        change(state)
        safetensors.torch.save_file(state, tmp_path / files.WEIGHTS)
    return tmp_path


@pytest.mark.filterwarnings("ignore:BertForSequenceClassification.from_pretrained")
def test_labels_have_the_names_of_the_folder_or_the_caller(folders, tmp_path):
    names = {"0": "bad", "1": "good"}
    path = changed(
        folders / "BertModel", tmp_path, "config.json", lambda c: c.update(id2label=names)
    )
    classifier = models.BertForSequenceClassification
    assert classifier.from_pretrained(path).id2label == {0: "bad", 1: "good"}
    assert classifier.from_pretrained(path, num_labels=3).id2label[2] == "LABEL_2"
    model = classifier.from_pretrained(path, num_labels=1, id2label={0: "stars"})
    model.save_pretrained(tmp_path / "saved")
    config = transformers.BertConfig.from_pretrained(tmp_path / "saved")
    assert (config.id2label, config.label2id) == ({0: "stars"}, {"stars": 0})
    with pytest.raises(ValueError, match="id2label must name 2 labels; got 1$"):
        classifier.from_pretrained(path, num_labels=2, id2label={0: "stars"})


@pytest.mark.parametrize(
    "file, change, sentence",
    [
        ("config.json", lambda c: c.update(model_type="gpt2"), "must be bert; got 'gpt2'"),
        ("config.json", lambda c: c.update(is_decoder=True), "is_decoder must be False; got True"),
        ("config.json", lambda c: c.update(model_type=[1]), r"must be bert; got \[1\]"),
        (
            "config.json",
            lambda c: c.update(hidden_size="32"),
            "hidden_size must be an .*; got '32'",
        ),
        ("config.json", lambda c: c.update(hidden_act=["gelu"]), r"hidden_act must be .*'gelu'\]"),
        (
            "config.json",
            lambda c: c.update(num_hidden_layers=2.0),
            "num_hidden_layers must be an integer >= 0; got 2.0",
        ),
        (
            "config.json",
            lambda c: c.update(hidden_size=16),
            r"bert.embeddings.word_embeddings.weight must have shape \(19, 16\), .*\(19, 32\)",
        ),
        (
            "config.json",
            lambda c: c.update(intermediate_size=64),
            r"layer.0.intermediate.dense.weight must have shape \(64, 32\), .*; got \(48, 32\)",
        ),
        (
            "weights",
            lambda s: s.pop("encoder.layer.1.attention.self.key.bias"),
            "bert.encoder.layer.1.attention.self.key.bias is missing",
        ),
    ],
)
def test_a_wrong_folder_is_one_sentence(folders, tmp_path, file, change, sentence):
    path = changed(folders / "BertModel", tmp_path, file, change)
    with pytest.raises(ValueError, match=sentence):
        models.AutoModel.from_pretrained(path)


def test_a_damaged_folder_is_one_sentence(folders, tmp_path):
    def refused(sentence):
        with pytest.raises(ValueError, match="^BertModel.from_pretrained: .*" + sentence):
            models.BertModel.from_pretrained(tmp_path)

    refused("config.json does not exist")
    (tmp_path / "config.json").write_text("{")
    refused("config.json cannot be read")
    models.BertModel.from_pretrained(folders / "BertModel").save_pretrained(
        tmp_path, max_shard_size=7000
    )
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(f"{shard.name} cannot be read")
    shard.unlink()
    refused(f"names {shard.name}, which does not exist")
    (tmp_path / files.INDEX).unlink()
    refused("has no model.safetensors, model.safetensors.index.json or pytorch_model.bin")


def test_what_hugging_face_has_not_is_refused(tmp_path):
    config = models.TransformerConfig.preset("tiny", vocab_size=64, norm_first=True)
    with pytest.raises(ValueError, match="Hugging Face's bert has no such model"):
        models.BertForMaskedLM(config).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
