"""The tokenizer: the same from the same text, special tokens first, saved whole or not at all."""

import errno
import json
import os
import subprocess
import sys

import pytest

from slimkernels.data import Tokenizer, split_sentences

TEXTS = ["The whale, the whale! Caf\u00e9.", "A whaling voyage by one Ishmael. Whales."]


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    names = tokenizer.decode(range(5), skip_special_tokens=False)
    assert names == "[PAD] [UNK] [CLS] [SEP] [MASK]"
    assert tokenizer.vocab_size == 2048


def test_same_documents_give_the_same_vocabulary(tokenizer, train_documents, tmp_path):
    # In another process too: the library's hash maps are seeded once for each.
    (tmp_path / "documents.json").write_text(json.dumps(train_documents))
    script = (
        "import json, sys; from slimkernels.data import Tokenizer\n"
        "documents = json.load(open(sys.argv[1] + '/documents.json'))\n"
        "Tokenizer.train(documents, 2048).save(sys.argv[1] + '/other.json')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    Tokenizer.train(train_documents, 2048).save(tmp_path / "again.json")
    tokenizer.save(tmp_path / "first.json")
    first = (tmp_path / "first.json").read_bytes()
    assert (tmp_path / "again.json").read_bytes() == first
    assert (tmp_path / "other.json").read_bytes() == first


@pytest.mark.parametrize(("asked", "expected"), [(1000, 1024), (1024, 1024), (64, 64)])
def test_vocab_size_is_rounded_up(train_documents, asked, expected):
    assert Tokenizer.train(train_documents[:4], asked).vocab_size == expected


def test_small_text_is_filled_up_with_unused_tokens():
    tokenizer = Tokenizer.train(["the cat"], 8192)
    assert tokenizer.vocab_size == 64
    assert tokenizer.decode([tokenizer.vocab_size - 1]).startswith("[unused")


def test_encode_documents_keeps_documents_and_sentences(tokenizer, train_documents):
    encoded = tokenizer.encode_documents([*TEXTS, "", *train_documents[:3]])
    sizes = [len(split_sentences(text)) for text in [*TEXTS, "", *train_documents[:3]]]
    assert [len(sentences) for sentences in encoded] == sizes
    assert tokenizer.decode(encoded[1][0]) == "a whaling voyage by one ishmael."
    assert all(
        max(sentence) < tokenizer.vocab_size for sentences in encoded for sentence in sentences
    )


def test_special_names_in_a_document_are_plain_text(tokenizer):
    (sentences,) = tokenizer.encode_documents(["He wrote [SEP] and [MASK] down."])
    assert not set(sentences[0]) & set(tokenizer.special_ids)
    assert tokenizer.mask_id in tokenizer.encode("the [MASK] sea")


def test_unknown_characters_become_unk(tokenizer):
    assert tokenizer.encode("\u6f22") == [tokenizer.unk_id]
    assert tokenizer.encode_documents(["\u6f22"]) == [[[tokenizer.unk_id]]]


def test_characters_are_ranked_by_frequency_where_they_do_not_all_fit():
    rare = "".join(chr(0x4E00 + number) for number in range(400))
    tokenizer = Tokenizer.train([rare, "\u4e10 " * 5], 64)
    assert tokenizer.vocab_size == 64
    assert tokenizer.encode("\u4e10") != [tokenizer.unk_id]
    assert tokenizer.encode(rare[-1]) == [tokenizer.unk_id]


@pytest.mark.parametrize("name", ["tokenizer.json", "named.json", "folder/inner"])
def test_save_and_load(tokenizer, train_documents, tmp_path, name):
    path = tokenizer.save(tmp_path / name)
    assert path.is_file()
    loaded = Tokenizer.load(tmp_path / name)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.special_ids == tokenizer.special_ids
    texts = [*train_documents[:2], "[SEP]"]
    assert loaded.encode_documents(texts) == tokenizer.encode_documents(texts)
    assert loaded.encode("a [MASK]") == tokenizer.encode("a [MASK]")
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch, step):
    (tmp_path / "tokenizer.json").write_text("old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "old"


def _without(saved, *keys):
    inner = saved
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return saved


BAD_FILES = {
    "not json": (lambda saved: None, "is damaged or not ours: Expecting value"),
    "list": (lambda saved: [1], "no WordPiece model"),
    "no model": (lambda saved: _without(saved, "model"), "no WordPiece model"),
    "hole": (lambda saved: _without(saved, "model", "vocab", "the"), "number the tokens from 0"),
    "no mask": (
        lambda saved: {**saved, "model": {**saved["model"], "vocab": {"a": 0, "[UNK]": 1}}},
        r"has no \[PAD\], \[CLS\], \[SEP\], \[MASK\]",
    ),
    "cased": (lambda saved: {**saved, "normalizer": {"lowercase": False}}, "lower-case WordPiece"),
    "kind": (lambda saved: {**saved, "model": {"type": "BPE", "vocab": {}}}, "needed; got BPE"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_in_one_sentence(tokenizer, tmp_path, case):
    change, sentence = BAD_FILES[case]
    path = tokenizer.save(tmp_path)
    changed = change(json.loads(path.read_text()))
    path.write_text("{" if changed is None else json.dumps(changed))
    with pytest.raises(ValueError, match=rf"Tokenizer\.load: .*{sentence}" if changed else "load"):
        Tokenizer.load(tmp_path)


def test_missing_and_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)


def test_training_refuses():
    with pytest.raises(ValueError, match="vocab_size must be at least 64; got 5"):
        Tokenizer.train(TEXTS, 5)
    for documents in ([], [" \n"]):
        with pytest.raises(ValueError, match="the documents hold no text"):
            Tokenizer.train(documents)


def test_tokenizers_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'slimkernels\[train\]'"):
        Tokenizer.train(TEXTS)
