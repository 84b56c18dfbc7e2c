"""The tokenizer of a folder against transformers' own."""

import pytest
import torch

from slimkernels.models import AutoTokenizer

transformers = pytest.importorskip("transformers")
library = pytest.importorskip("tokenizers")

WORDS = "the cat caf ##e naive ##s ran , . ! 1 2 \u4e2d \u56fd"
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
TEXTS = [
    "The cats ran, ran!",
    "Caf\u00e9 \u2014 na\u00efve",
    "",
    "\u4e2d\u56fd [MASK] the\tcat",
    "12 " * 9,
    "\U0001f600 the",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """vocab.txt alone, as BERT's first folders have it."""
    path = tmp_path_factory.mktemp("vocabulary")
    (path / "vocab.txt").write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """tokenizer.json and what stands beside it, as transformers writes them."""
    path = tmp_path_factory.mktemp("saved")
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    theirs.model_max_length = 12
    theirs.save_pretrained(path)
    return path


CALLS = [
    {},
    {"padding": True},
    {"padding": "max_length", "max_length": 9, "truncation": True},
    {"truncation": True},
    {"padding": "longest", "add_special_tokens": False, "return_tensors": "pt"},
]


@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("form", ["texts", "pairs", "text_pair", "one"])
def test_inputs_are_transformers(saved, options, form):
    ours, theirs = (
        AutoTokenizer.from_pretrained(saved),
        transformers.BertTokenizer.from_pretrained(saved),
    )
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    text, kwargs = {
        "texts": (TEXTS, {}),
        "pairs": (pairs, {}),
        "text_pair": (TEXTS, {"text_pair": TEXTS[::-1]}),
        "one": (TEXTS[0], {}),
    }[form]
    actual, expected = (t(text, **kwargs, **options) for t in (ours, theirs))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert actual[name].dtype == value.dtype and torch.equal(actual[name], value)
        else:
            assert actual[name] == value


def test_vocabulary_makes_the_same_tokenizer(folder, saved, tmp_path):
    from_text, from_json = (
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(saved),
    )
    assert from_text(TEXTS) == from_json(TEXTS)
    assert (from_text.pad_token_id, from_text.mask_token, len(from_text)) == (0, "[MASK]", 19)
    ids = from_text.encode("the cats [MASK] .")
    assert from_text.convert_ids_to_tokens(ids)[1:4] == ["the", "cat", "##s"]
    assert from_text.convert_tokens_to_ids(["the", "nowhere"]) == [5, 1]
    assert from_text.batch_decode([ids], skip_special_tokens=True) == ["the cats."]
    from_text(TEXTS, padding=True, truncation=True, max_length=4)
    assert from_text(TEXTS) == from_json(TEXTS)  # nothing is left of the call before
    from_text.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS) == from_json(TEXTS)


@pytest.mark.parametrize("kind, has_types", [("bert", True), ("llama", False)])
def test_inputs_are_those_of_the_model(saved, tmp_path, kind, has_types):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    assert ("token_type_ids" in AutoTokenizer.from_pretrained(tmp_path)("the")) == has_types


def test_padding_on_the_left(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.padding_side = "left"
    batch = tokenizer(["the", "the cat ran"], padding=True, return_tensors="pt").to("cpu")
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1, 1], [1] * 5]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"padding": "widest"}, "padding must be a bool, .*; got 'widest'"),
        ({"truncation": True, "max_length": 2}, "max_length must be an integer above 2, .*; got 2"),
        ({"max_length": -1}, "max_length must be an integer above 2, .*; got -1"),
        ({"truncation": "last"}, "truncation must be a bool or .*; got 'last'"),
        ({"return_tensors": "np"}, "return_tensors must be 'pt' or None; got 'np'"),
        ({"return_tensors": "pt"}, "a tensor of them needs padding=True"),
        ({"text_pair": ["a"]}, "text_pair must have 6 texts like text; got 1"),
        ({"text_pair": "a"}, "text_pair must be a list of strings like text; got 'a'"),
        ({"text": None}, "text must be a string, a list of .*; got None"),
        ({"text": ["the", 1]}, "text must be a string, a list of .*; got 1 in it"),
        ({"text": [("a", "b", "c")]}, r"text must be .*; got \('a', 'b', 'c'\) in it"),
        ({"text": [("a", "b")], "text_pair": ["c"]}, "text_pair must be None where text has pairs"),
        ({"text": "a\ud800"}, r"text must be Unicode; got half .*, '\\ud800', at 1 of a text of 2"),
        ({"text": [("a", "b"), ("c", "\udfff")]}, r"text must be Unicode; .*'\\udfff', at 0 of"),
    ],
)
def test_bad_calls_are_one_sentence(saved, options, sentence):
    with pytest.raises(ValueError, match="^tokenizer: .*" + sentence):
        AutoTokenizer.from_pretrained(saved)(**{"text": TEXTS} | options)


@pytest.mark.parametrize("wrong", [-1, 2**32])
def test_what_is_no_id_is_one_sentence(saved, wrong):
    ours, theirs = AutoTokenizer.from_pretrained(saved), transformers.BertTokenizer
    for function in (ours.decode, ours.convert_ids_to_tokens):
        with pytest.raises(ValueError, match=f"^tokenizer: ids must be from 0 to .*; got {wrong}$"):
            function([5, wrong])
    ids = [5, 10**9, 6]  # of the library's integers, and nobody's
    assert ours.decode(ids) == theirs.from_pretrained(saved).decode(ids) == "the cat"
    assert ours.convert_ids_to_tokens(ids) == ["the", None, "cat"]


@pytest.mark.parametrize("entry, value", [("model_max_length", "512"), ("padding_side", "up")])
def test_wrong_settings_are_one_sentence(saved, entry, value):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    sentence = f"^tokenizer: {entry} must be .*; tokenizer_config.json has '{value}'$"
    with pytest.raises(ValueError, match=sentence):
        AutoTokenizer(tokenizer.inner, tokenizer.settings | {entry: value})


def test_bad_folders_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no tokenizer.json and no vocab.txt$"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    with pytest.raises(ValueError, match=r"vocab.txt has no \[CLS\], \[SEP\], \[MASK\]$"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        AutoTokenizer.from_pretrained(tmp_path)
