"""Reading documents, refusing bad files in a sentence, splitting sentences and held-out text."""

import gzip
import json
import lzma
import re
import sys

import pytest

from slimkernels.data import read_documents, sample_path, split_documents, split_sentences

TEXTS = [
    "The first document.\n\nIt has two paragraphs.",
    "Ein zweites Dokument, nicht ASCII: \u00e9.",
]
LINES = "".join(json.dumps({"text": text, "meta": {"id": 1}}) + "\n" for text in TEXTS).encode()


def _zstd(content):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": _zstd}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_compression_gives_the_same_documents(tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES))
    assert read_documents(path) == TEXTS


def test_several_zstandard_frames_and_lines_across_blocks(tmp_path):
    path = tmp_path / "corpus.jsonl.zst"
    long_text = "word " * 1_000_000
    record = json.dumps({"text": long_text}).encode()
    path.write_bytes(_zstd(LINES) + _zstd(record[:700_000]) + _zstd(record[700_000:]))
    assert read_documents(path) == [*TEXTS, long_text]


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_bytes(b"\xef\xbb\xbfOne paragraph\nof two lines\n\nAnother")
    assert read_documents(path) == ["One paragraph\nof two lines\n\nAnother"]
    assert split_sentences(read_documents(path)[0]) == ["One paragraph of two lines", "Another"]


def test_folder_is_its_files_in_sorted_order(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.txt").write_text("third")
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "README.md").write_text("passed over")
    assert read_documents(tmp_path) == [*TEXTS, "second", "third"]


GOOD = b'{"text": "fine"}\n'
BAD_FILES = {
    "not json": ("x.jsonl", GOOD + b"\n{'text': 1}\n", r"x\.jsonl, line 3 is not JSON: "),
    "cut record": ("x.jsonl", GOOD + b'{"text": "fi', r"line 2 is not JSON: Unterminated"),
    "huge number": ("x.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"line 1 is not JSON: "),
    "nested": ("x.jsonl", b"[" * 200_000, r"line 1 is not JSON: "),
    "no text": (
        "x.jsonl",
        GOOD + b'{"body": "", "id": 1}',
        r'line 2 has no key "text"; its keys: body',
    ),
    "list": ("x.jsonl", b"[1]", r"line 1 must be a JSON object with text; got a list"),
    "number": ("x.jsonl", b'{"text": 5}', r'must have a string under "text"; got a int'),
    "surrogate": ("x.jsonl", b'{"text": "\\ud800"}', r"line 1 has half a surrogate pair"),
    "latin-1 jsonl": (
        "x.jsonl",
        GOOD + b'{"text": "caf\xe9"}',
        r"line 2 is not UTF-8: byte 13 is 0xe9",
    ),
    "latin-1 txt": ("x.txt", b"caf\xe9", r"x\.txt is not UTF-8: byte 3 is 0xe9"),
    "empty": ("x.jsonl", b"", r"x\.jsonl is empty"),
    "blank": ("x.jsonl", b'{"text": " \\n"}\n\n', r"x\.jsonl is empty"),
    "empty gz": ("x.jsonl.gz", b"", r"is empty"),
    "suffix": ("x.csv", b"a,b", r"x\.csv must be named \*\.jsonl, .* or \*\.txt"),
    "not gz": ("x.jsonl.gz", LINES, r"x\.jsonl\.gz is a truncated or damaged archive"),
    "not xz": ("x.jsonl.xz", LINES, r"x\.jsonl\.xz is a truncated or damaged archive"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_refused_in_one_sentence(tmp_path, case):
    name, content, sentence = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_documents(path)
    assert str(caught.value).startswith("read_documents: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated by a byte", "truncated to half", "overwritten"])
def test_damaged_archive(tmp_path, suffix, damage):
    packed = COMPRESS[suffix](LINES * 50)
    damaged = {
        "truncated by a byte": packed[:-1],
        "truncated to half": packed[: len(packed) // 2],
        "overwritten": b"\x00" * 16 + packed[16:],
    }[damage]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"x\.jsonl\{suffix} is a truncated or damaged archive"):
        read_documents(path)


def test_missing_path_and_folder_without_text(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=re.escape(f"folder {tmp_path} has no file named")):
        read_documents(tmp_path)


def test_zstandard_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "x.jsonl.zst").write_bytes(b"")
    with pytest.raises(ValueError, match=r"needs the zstandard package \(pip install zstandard\)"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. Knightley came. He sat.", ["Mr. Knightley came.", "He sat."]),
        ("Gen. U. S. Grant spoke. We heard.", ["Gen. U. S. Grant spoke.", "We heard."]),
        ('"So do I." She left.', ['"So do I."', "She left."]),
        ("So do I. She left.", ["So do I.", "She left."]),
        ('"Who, Flask!" cried Stubb; "I."', ['"Who, Flask!" cried Stubb; "I."']),
        ("It cost 3.5 dollars. 40 more came.", ["It cost 3.5 dollars.", "40 more came."]),
        ("CHAPTER I\n \nA line\nand another.", ["CHAPTER I", "A line and another."]),
        ("\u597d\u3002\u662f\u5417\uff1f\u662f", ["\u597d\u3002", "\u662f\u5417\uff1f", "\u662f"]),
        (" \n\n ", []),
    ],
)
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_split_sentences_loses_nothing(sample_documents):
    for document in sample_documents[::50]:
        assert " ".join(split_sentences(document)).split() == document.split()


def test_sample_is_small_and_split_without_overlap(sample_documents):
    assert sum(file.stat().st_size for file in sample_path().iterdir()) <= 3_000_000
    train, heldout = split_documents(sample_documents)
    assert sorted(train + heldout) == sorted(sample_documents)
    assert not {" ".join(text.split()) for text in train} & {
        " ".join(text.split()) for text in heldout
    }
    source = (sample_path() / "SOURCE.md").read_text(encoding="ascii")
    assert f"{len(sample_documents)} documents" in source
    assert f"Held out are {len(heldout)} documents, {sum(map(len, heldout)):,} characters" in source


def test_split_keeps_each_document_on_its_side(sample_documents):
    train, heldout = split_documents(sample_documents)
    other_train, other_heldout = split_documents(sample_documents[::-2])
    assert set(other_train) <= set(train)
    assert set(other_heldout) <= set(heldout)
    respaced = [text.upper().replace(" ", "\n") for text in heldout]
    assert split_documents(train + respaced)[1] == respaced


def test_split_share(assert_binomial):
    _, heldout = split_documents([f"document {number}" for number in range(20_000)], 0.2)
    assert_binomial(len(heldout), 20_000, 0.2)


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_split_of_few_documents_leaves_two_on_either_side(share):
    train, heldout = split_documents(["a", "b", "A ", "c", "d"], share)
    assert sorted(train + heldout) == ["A ", "a", "b", "c", "d"]
    assert {len({text.strip().lower() for text in side}) for side in (train, heldout)} == {2}
    assert ("a" in train) == ("A " in train)


def test_split_refuses():
    with pytest.raises(ValueError, match="at least four different documents are needed.*got 3"):
        split_documents(["same", " Same", "b", "c"])
    with pytest.raises(ValueError, match=r"heldout_share must be in \(0, 1\); got 1.5"):
        split_documents(["a", "b"], 1.5)
