"""Documents from files, sentences from documents, and the split into training and held-out text."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".txt")

_CHUNK = 1 << 20
# What the standard library and zstandard raise on a damaged archive; EOFError is a truncated one.
_DAMAGE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)

# A run of sentence-ending marks, the quotes and brackets that close with it, then white space,
# which Chinese and Japanese marks (the second form) do not need.
_CLOSING = "[\"')\\]\u2019\u201d\u300d\u300f]*"
_SENTENCE_END = re.compile(f"[.!?\u2026]+{_CLOSING}\\s+|[\u3002\uff01\uff1f]+{_CLOSING}\\s*")
_OPENING = "\"'([_\u2018\u201c"
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n")
# fmt: off
_ABBREVIATIONS = frozenset((
    "mr", "mrs", "ms", "dr", "st", "rev", "hon", "gen", "col", "capt", "lieut", "lt", "sgt",
    "messrs", "prof", "jr", "sr", "vs", "vol", "fig", "i.e", "e.g", "u.s", "cf", "esq",
))
# fmt: on


def read_documents(path: str | Path) -> list[str]:
    """The documents of a file, or of every such file under a folder in sorted order.

    path     .jsonl, .jsonl.gz, .jsonl.xz or .jsonl.zst: one JSON object a line, the document under
             the key "text" (SlimPajama's form; other keys are ignored). .txt: one document, its
             paragraphs separated by blank lines. In a folder, files of other kinds are passed over.
    Returns  the documents that hold more than white space.
    Raises   ValueError in one sentence: nothing there, nothing in it, a line that is not JSON or
             has no text, bytes that are not UTF-8, a truncated or damaged archive, zstandard
             missing.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and _suffix(file)]
        if not files:
            raise ValueError(f"read_documents: folder {path} has no file named {_kinds()}")
    elif path.exists():
        if _suffix(path) is None:
            raise ValueError(f"read_documents: {path} must be named {_kinds()}")
        files = [path]
    else:
        raise ValueError(f"read_documents: {path} does not exist")
    documents = [text for file in files for text in _read_file(file) if text.strip()]
    if not documents:
        raise ValueError(f"read_documents: {path} is empty: it holds no document with any text")
    return documents


def split_documents(
    documents: Sequence[str], heldout_share: float = 0.05
) -> tuple[list[str], list[str]]:
    """Splits whole documents into (training, held-out), by a hash of each document's words.

    A document's side depends on its own text only, so it keeps it whatever is added or reordered,
    and copies that differ in case or spacing land on the same side. Where the hash leaves a side
    with fewer than the two documents that sentence pairs need, as in a corpus of a few documents,
    those nearest to that side go over.

    heldout_share  expected share of the documents held out, in (0, 1)
    Raises         ValueError when there are not four different documents.
    """
    if not 0.0 < heldout_share < 1.0:
        raise ValueError(f"split_documents: heldout_share must be in (0, 1); got {heldout_share}")
    places = [_place(text) for text in documents]
    distinct = sorted(set(places))
    if len(distinct) < 4:
        raise ValueError(
            "split_documents: at least four different documents are needed, two to train on and "
            f"two to hold out; got {len(distinct)}"
        )
    threshold = heldout_share if heldout_share > distinct[1] else distinct[2]
    threshold = min(threshold, distinct[-2])
    train = [text for text, place in zip(documents, places, strict=True) if place >= threshold]
    heldout = [text for text, place in zip(documents, places, strict=True) if place < threshold]
    return train, heldout


def sample_path() -> Path:
    """The embedded corpus, a folder that read_documents takes; its SOURCE.md says what is in it."""
    return Path(__file__).parent / "sample"


def split_sentences(text: str) -> list[str]:
    """The sentences of a document, each with its white space collapsed to single spaces.

    A sentence ends at a blank line, and after . ! ? or an ellipsis (with any closing quotes and
    brackets) before white space and a word that does not begin in lower case, unless the word
    before a full stop is a known abbreviation or a single capital other than I. Chinese and
    Japanese full stops, exclamation and question marks end a sentence wherever they stand.
    """
    return [
        sentence
        for paragraph in _PARAGRAPH.split(text)
        for sentence in _paragraph_sentences(" ".join(paragraph.split()))
    ]


def _paragraph_sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _SENTENCE_END.finditer(paragraph):
        if _ends_sentence(paragraph, start, match):
            yield paragraph[start : match.end()].rstrip()
            start = match.end()
    if start < len(paragraph):
        yield paragraph[start:]


def _ends_sentence(paragraph: str, start: int, match: re.Match) -> bool:
    mark = match.group()[0]
    if mark in "\u3002\uff01\uff1f":
        return True
    following = paragraph[match.end() : match.end() + 4].lstrip(_OPENING)[:1]
    if following.islower():
        return False
    if not match.group().startswith(". "):
        return True
    word = paragraph[max(start, match.start() - 12) : match.start()].rsplit(" ", 1)[-1]
    word = word.lstrip(_OPENING)
    # "I." ends far more sentences ("so do I.") than it abbreviates names.
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return not is_initial and word.lower() not in _ABBREVIATIONS


def _place(text: str) -> float:
    """A number in [0, 1) that depends on the document's words only."""
    digest = hashlib.sha256(" ".join(text.lower().split()).encode())
    return int.from_bytes(digest.digest()[:6], "big") / 2**48


def _kinds() -> str:
    return ", ".join(f"*{suffix}" for suffix in SUFFIXES[:-1]) + f" or *{SUFFIXES[-1]}"


def _suffix(file: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def _read_file(file: Path) -> Iterator[str]:
    suffix = _suffix(file)
    try:
        if suffix == ".txt":
            yield _decode(file.read_bytes(), str(file))
            return
        for number, line in enumerate(_lines(file, suffix), start=1):
            if line.strip():
                yield _record_text(line, f"{file}, line {number}")
    except _DAMAGE as error:
        raise ValueError(
            f"read_documents: {file} is a truncated or damaged archive ({error})"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"read_documents: {file} cannot be read: {reason}") from error


def _lines(file: Path, suffix: str) -> Iterator[bytes]:
    if suffix == ".jsonl.zst":
        yield from _zstandard_lines(file)
        return
    opener = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}[suffix]
    with opener(file, "rb") as stream:
        yield from stream


def _zstandard_lines(file: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            f"read_documents: {file} needs the zstandard package (pip install zstandard)"
        ) from error
    try:
        rest = b""
        for block in _zstandard_blocks(file, zstandard.ZstdDecompressor(max_window_size=2**31)):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
        yield rest
    except zstandard.ZstdError as error:
        raise ValueError(
            f"read_documents: {file} is a truncated or damaged archive ({error})"
        ) from error


def _zstandard_blocks(file: Path, decompressor) -> Iterator[bytes]:
    # By hand, because stream_reader() ends a truncated frame as if it were whole.
    frame = None
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            while chunk:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = b""
                if frame.eof:
                    chunk, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last frame does not end")


def _record_text(line: bytes, place: str) -> str:
    content = _decode(line, place)
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_documents: {place} is not JSON: {error}") from error
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"read_documents: {place} must be a JSON object with text; got a {kind}")
    if "text" not in record:
        keys = ", ".join(sorted(record)[:8]) or "none"
        raise ValueError(f'read_documents: {place} has no key "text"; its keys: {keys}')
    if not isinstance(record["text"], str):
        kind = type(record["text"]).__name__
        raise ValueError(f'read_documents: {place} must have a string under "text"; got a {kind}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"read_documents: {place} has half a surrogate pair in text") from error
    return record["text"]


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{content[error.start]:02x}"
        raise ValueError(f"read_documents: {place} is not UTF-8: {byte}") from error
