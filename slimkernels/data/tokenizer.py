"""A BERT WordPiece tokenizer: lower-case, accents stripped, learned from the documents themselves.

WordPiece as in Devlin et al. 2019 (BERT); learning and encoding run in the tokenizers library.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from slimkernels.data.text import split_sentences

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILE_NAME = "tokenizer.json"

# Most characters the vocabulary spells out; what is rarer becomes [UNK].
_ALPHABET_LIMIT = 1000


class Tokenizer:
    """Text to WordPiece ids and back.

    pad_id, unk_id, cls_id, sep_id, mask_id   ids of the special tokens; 0 to 4 in a trained one
    special_ids                               all five, a tuple in that order
    vocab_size                                ids are below this; a multiple of 64 in a trained one
    """

    def __init__(self, inner) -> None:
        """inner: a tokenizers.Tokenizer whose vocabulary has BERT's five special tokens."""
        missing = [token for token in SPECIAL_TOKENS if inner.token_to_id(token) is None]
        if missing:
            raise ValueError(f"Tokenizer: the vocabulary has no {', '.join(missing)}")
        self._inner = inner
        # A document that spells out "[SEP]" means the characters, not the boundary.
        self._literal = _tokenizers().Tokenizer.from_str(inner.to_str())
        self._literal.encode_special_tokens = True
        self.special_ids = tuple(inner.token_to_id(token) for token in SPECIAL_TOKENS)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self.vocab_size = inner.get_vocab_size()

    @classmethod
    def train(cls, documents: Sequence[str], vocab_size: int = 8192) -> Tokenizer:
        """Learns a vocabulary; the same documents give the same vocabulary, on any machine.

        vocab_size  rounded up to a multiple of 64, which GEMM kernels like; where the documents
                    hold fewer word pieces, [unusedN] tokens fill the last 64
        Raises      ValueError when the documents hold no text or vocab_size is below 64.
        """
        if vocab_size < 64:
            raise ValueError(f"Tokenizer.train: vocab_size must be at least 64; got {vocab_size}")
        vocabulary = _learn(documents, _round_up(vocab_size))
        for unused in range(_round_up(len(vocabulary)) - len(vocabulary)):
            vocabulary[f"[unused{unused}]"] = len(vocabulary)
        return cls(_wordpiece(vocabulary))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads what save() wrote: the file, or the folder that holds it as tokenizer.json."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        try:
            content = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise ValueError(f"Tokenizer.load: {path} does not exist") from error
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"Tokenizer.load: {path} cannot be read: {error}") from error
        try:
            return cls(_wordpiece(_saved_vocabulary(content)))
        except ValueError as error:
            raise ValueError(f"Tokenizer.load: {path} is damaged or not ours: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Writes the folder's tokenizer.json, or the .json file named, whole or not at all."""
        path = Path(path)
        path = path if path.suffix == ".json" else path / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as stream:
                stream.write(self._inner.to_str(pretty=True))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return path

    def encode_documents(self, documents: Sequence[str]) -> list[list[list[int]]]:
        """For each document, its sentences (split_sentences); for each sentence, its ids.

        No special tokens are added. Sentences of no tokens are left out. Runs on all cores.
        """
        sentences = [split_sentences(document) for document in documents]
        flat = [sentence for document in sentences for sentence in document]
        ids = iter(self._literal.encode_batch_fast(flat, add_special_tokens=False))
        return [
            [encoded for encoded in (next(ids).ids for _ in document) if encoded]
            for document in sentences
        ]

    def encode(self, text: str) -> list[int]:
        """The ids of one text; special tokens only where it names them: "the [MASK] sea"."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids, word pieces joined; lower-case, as everything the tokenizer knows."""
        ids = [int(token) for token in ids]
        return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)


def _tokenizers():
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "Tokenizer needs the tokenizers package: pip install 'slimkernels[train]'"
        ) from error
    return tokenizers


def _saved_vocabulary(content: str) -> dict[str, int]:
    # By hand, because the library answers anything wrong in the text with a bare Exception.
    saved = json.loads(content)
    try:
        kind, vocabulary = saved["model"]["type"], saved["model"]["vocab"]
        is_lower_case = saved["normalizer"]["lowercase"]
    except (KeyError, TypeError) as error:
        raise ValueError("it has no WordPiece model with a lower-case normalizer") from error
    if kind != "WordPiece" or is_lower_case is not True:
        raise ValueError(f"a lower-case WordPiece model is needed; got {kind}")
    if not isinstance(vocabulary, dict) or set(vocabulary.values()) != set(range(len(vocabulary))):
        raise ValueError("its vocabulary does not number the tokens from 0 on")
    return vocabulary


def _round_up(vocab_size: int) -> int:
    return -(-vocab_size // 64) * 64


def _wordpiece(vocabulary: dict[str, int] | None = None):
    tokenizers = _tokenizers()
    wordpiece = tokenizers.models.WordPiece(vocabulary or {}, unk_token="[UNK]")
    inner = tokenizers.Tokenizer(wordpiece)
    inner.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    inner.decoder = tokenizers.decoders.WordPiece()
    if vocabulary:
        # Only those it has: the library would give the others ids past the end.
        inner.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return inner


def _learn(documents: Sequence[str], vocab_size: int) -> dict[str, int]:
    """Token to id, special tokens first.

    The library's trainer numbers the "##x" pieces in the order of a hash map seeded at random, and
    breaks ties between merges by those numbers, so two runs differ. A first pass, stopped before
    any merge, finds these pieces; the second gets them in sorted order, as if they were special.
    """
    alphabet = _alphabet(documents, limit=min(_ALPHABET_LIMIT, vocab_size // 4))
    if not alphabet:
        raise ValueError("Tokenizer.train: the documents hold no text")
    pieces = _run_trainer(documents, alphabet, SPECIAL_TOKENS, vocab_size=1)
    continuing = sorted(piece for piece in pieces if piece.startswith("##") and len(piece) == 3)
    return _run_trainer(documents, alphabet, (*SPECIAL_TOKENS, *continuing), vocab_size)


def _run_trainer(documents, alphabet, special_tokens, vocab_size: int) -> dict[str, int]:
    inner = _wordpiece()
    trainer = _tokenizers().trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    inner.train_from_iterator(documents, trainer, length=len(documents))
    return inner.get_vocab()


def _alphabet(documents: Sequence[str], limit: int) -> list[str]:
    """The most frequent characters after normalisation, ties broken by code point."""
    normalizer = _wordpiece().normalizer
    counts = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    ranked = sorted((-count, char) for char, count in counts.items() if not char.isspace())
    return [char for _, char in ranked[:limit]]
