"""A Hugging Face folder's tokenizer, called as in the published examples.

The work is done by the tokenizers library; this says what the folder's other files say of it:
the names of special tokens, the longest sequence, the side of padding, which inputs the model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slimkernels.models import files
from slimkernels.models.config import is_number

TOKENIZER = "tokenizer.json"
_SETTINGS = "tokenizer_config.json"
_VOCABULARY = "vocab.txt"
_SPECIAL = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
_LARGEST_ID = 2**32 - 1  # of the library's integers
# What stands in for "no limit" in tokenizer_config.json is around 1e30.
_NO_LIMIT = 10**9
# Classes that do not say whose inputs they make.
_OF_ANY_MODEL = (None, "PreTrainedTokenizerFast", "TokenizersBackend")
_STRATEGIES = {
    True: "longest_first",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}


class Encoding(dict):
    """input_ids, attention_mask and, where the model has them, token_type_ids, by name."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str) -> Encoding:
        """The same on a device, if these are tensors."""
        return Encoding({name: tensor.to(device) for name, tensor in self.items()})


class AutoTokenizer:
    """Text to a model's inputs, and ids back to text.

    pad_token, pad_token_id and so on for unk, cls, sep, mask, bos, eos; None where there is none
    model_max_length    the longest sequence; None for no limit
    padding_side        "right" or "left"
    model_input_names   what a call returns
    inner               the tokenizers.Tokenizer
    """

    def __init__(self, inner, settings: dict | None = None) -> None:
        """settings: tokenizer_config.json's entries."""
        self.inner, self.settings = inner, dict(settings or {})
        for name in _SPECIAL:
            token = self.settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            setattr(self, f"{name}_token", token)
            setattr(self, f"{name}_token_id", None if token is None else inner.token_to_id(token))
        limit = self._setting("model_max_length", None, is_number, "a number")
        self.model_max_length = None if limit is None or limit > _NO_LIMIT else int(limit)
        self.padding_side = self._setting(
            "padding_side", "right", lambda side: side in ("right", "left"), "'right' or 'left'"
        )
        self.model_input_names = self._setting("model_input_names", [], _are_texts, "names") or (
            ["input_ids", "token_type_ids", "attention_mask"]
            if "Bert" in self.settings.get("tokenizer_class", "Bert")
            else ["input_ids", "attention_mask"]
        )

    def _setting(self, name, default, is_right, expected):
        """An entry of tokenizer_config.json, or `default` where it has none or null."""
        value = self.settings.get(name)
        value = default if value is None else value
        if value is not None and not is_right(value):
            raise ValueError(f"tokenizer: {name} must be {expected}; {_SETTINGS} has {value!r}")
        return value

    @classmethod
    def from_pretrained(cls, path: str | Path) -> AutoTokenizer:
        """The tokenizer of a folder, or of a name on the Hub if huggingface_hub is installed.

        It is tokenizer.json; or, where there is none, BERT's WordPiece over vocab.txt.
        Errors  ValueError where the folder has neither, or one is damaged
        """
        caller = "AutoTokenizer.from_pretrained"
        folder = files.folder_of(path, caller)
        settings = {}
        for name in ("special_tokens_map.json", _SETTINGS):
            if (folder / name).exists():
                settings |= files.read_json(folder / name, caller)
        if settings.get("tokenizer_class") in _OF_ANY_MODEL and (folder / files.CONFIG).exists():
            kind = files.read_json(folder / files.CONFIG, caller).get("model_type", "")
            settings["tokenizer_class"] = "BertTokenizer" if kind == "bert" else kind
        library = _tokenizers(caller)
        if (folder / TOKENIZER).exists():
            try:
                inner = library.Tokenizer.from_file(str(folder / TOKENIZER))
            except Exception as error:  # the library's own kind
                raise ValueError(
                    f"{caller}: {folder / TOKENIZER} cannot be read: {error}"
                ) from error
        elif (folder / _VOCABULARY).exists():
            inner, names = _wordpiece(library, folder / _VOCABULARY, settings)
            settings = names | settings
        else:
            raise ValueError(f"{caller}: {folder} has no {TOKENIZER} and no {_VOCABULARY}")
        return cls(inner, settings)

    def save_pretrained(self, path: str | Path) -> Path:
        """Writes tokenizer.json and tokenizer_config.json into the folder `path`; returns it."""
        folder = files.path_of(path, "AutoTokenizer.save_pretrained")
        folder.mkdir(parents=True, exist_ok=True)
        self.inner.no_padding()
        self.inner.no_truncation()
        files.write_text(folder / TOKENIZER, self.inner.to_str(pretty=True))
        files.write_json(folder / _SETTINGS, self.settings)
        return folder

    def __len__(self) -> int:
        """Ids are below this."""
        return self.inner.get_vocab_size()

    def __call__(
        self,
        text: str | Sequence,
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> Encoding:
        """A model's inputs for one text, or for a list of texts or of pairs.

        text            a string, a list of strings, or a list of pairs (two strings)
        text_pair       the second text of each, as a string or a list like text
        padding         True or "longest": to the longest of the batch; "max_length": to max_length
        truncation      True or "longest_first", "only_first", "only_second": to max_length
        max_length      None for model_max_length
        return_tensors  "pt" for int64 tensors (B, T), which want equal lengths; None for lists
        Returns         an Encoding; of one string without return_tensors, lists without a batch
        Errors          ValueError for what is none of these, and where there is no padding token
        """
        self._set(padding, truncation, max_length)
        is_one = isinstance(text, str)
        texts = _texts(text, text_pair)
        try:
            encoded = self.inner.encode_batch(texts, add_special_tokens=add_special_tokens)
        except TypeError:  # of all that is checked above it is left to be no Unicode
            _refuse_surrogates(texts)
            raise
        fields = {
            "input_ids": [e.ids for e in encoded],
            "token_type_ids": [e.type_ids for e in encoded],
            "attention_mask": [e.attention_mask for e in encoded],
        }
        fields = {name: fields[name] for name in self.model_input_names if name in fields}
        if return_tensors == "pt":
            return Encoding({name: _tensor(rows) for name, rows in fields.items()})
        if return_tensors is not None:
            raise ValueError(
                f"tokenizer: return_tensors must be 'pt' or None; got {return_tensors!r}"
            )
        return Encoding({name: rows[0] if is_one else rows for name, rows in fields.items()})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, whole."""
        return self(text, add_special_tokens=add_special_tokens)["input_ids"]

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        """The text of ids; one that no token has stands for nothing, as in transformers."""
        return self.inner.decode(_ids(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Iterable, *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """The id of a token, or of each; that of unk_token for one it does not know."""
        if isinstance(tokens, str):
            found = self.inner.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Iterable[int] | Tensor) -> list[str | None]:
        """The token of each id; None where no token has it."""
        return [self.inner.id_to_token(i) for i in _ids(ids)]

    def _set(self, padding, truncation, max_length):
        """Every call sets both anew: a tokenizer.json may come with settings of its own."""
        special = self.inner.num_special_tokens_to_add(is_pair=False)
        is_whole = isinstance(max_length, int) and not isinstance(max_length, bool)
        if max_length is not None and not (is_whole and max_length > special):
            raise ValueError(
                f"tokenizer: max_length must be an integer above {special}, the number of special "
                f"tokens; got {max_length!r}"
            )
        limit = self.model_max_length if max_length is None else max_length
        self.inner.no_truncation()
        self.inner.no_padding()
        if truncation:
            if truncation not in _STRATEGIES:
                known = " or ".join(list(_STRATEGIES)[1:])
                raise ValueError(
                    f"tokenizer: truncation must be a bool or {known}; got {truncation!r}"
                )
            if limit is not None:
                self.inner.enable_truncation(limit, strategy=_STRATEGIES[truncation])
        if not padding:
            return
        if padding not in (True, "longest", "max_length"):
            raise ValueError(
                f"tokenizer: padding must be a bool, 'longest' or 'max_length'; got {padding!r}"
            )
        if self.pad_token_id is None:
            raise ValueError("tokenizer: it has no pad_token, so padding must be False")
        if padding == "max_length" and limit is None:
            raise ValueError("tokenizer: max_length must be given to pad to it; got None")
        self.inner.enable_padding(
            direction=self.padding_side,
            pad_id=self.pad_token_id,
            pad_token=self.pad_token,
            length=limit if padding == "max_length" else None,
        )


def _are_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _texts(text, text_pair) -> list[str | tuple[str, str]]:
    """What is to be encoded, a text or a pair each."""
    is_one = isinstance(text, str)
    expected = "a string, a list of strings or a list of pairs of strings"
    if not (is_one or isinstance(text, Iterable)):
        raise ValueError(f"tokenizer: text must be {expected}; got {text!r}")
    texts = [text] if is_one else list(text)
    texts = [tuple(t) if isinstance(t, list) else t for t in texts]
    for t in texts:
        if not (isinstance(t, str) or (_are_texts(t) and len(t) == 2)):
            raise ValueError(f"tokenizer: text must be {expected}; got {t!r} in it")
    if text_pair is None:
        return texts
    if not (isinstance(text_pair, str) if is_one else _are_texts(text_pair)):
        expected = "a string" if is_one else "a list of strings"
        raise ValueError(f"tokenizer: text_pair must be {expected} like text; got {text_pair!r}")
    seconds = [text_pair] if is_one else list(text_pair)
    if not _are_texts(texts):
        raise ValueError("tokenizer: text_pair must be None where text has pairs")
    if len(seconds) != len(texts):
        raise ValueError(
            f"tokenizer: text_pair must have {len(texts)} texts like text; got {len(seconds)}"
        )
    return list(zip(texts, seconds, strict=True))


def _refuse_surrogates(texts: list[str | tuple[str, str]]) -> None:
    """Names the first character that no encoding of Unicode has."""
    for text in (each for t in texts for each in ((t,) if isinstance(t, str) else t)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"tokenizer: text must be Unicode; got half of a surrogate pair, "
                f"{text[error.start]!r}, at {error.start} of a text of {len(text)} characters"
            ) from None


def _ids(ids: Iterable[int] | Tensor) -> list[int]:
    found = [int(i) for i in ids]
    for i in found:
        if not 0 <= i <= _LARGEST_ID:
            raise ValueError(f"tokenizer: ids must be from 0 to {_LARGEST_ID}; got {i}")
    return found


def _tensor(rows: list[list[int]]) -> Tensor:
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            "tokenizer: the texts differ in length: a tensor of them needs padding=True"
        )
    return torch.tensor(rows, dtype=torch.int64)


def _wordpiece(library, path: Path, settings: dict):
    """BERT's tokenizer over a vocabulary, a token a line; and its special tokens' names."""
    tokens = path.read_text(encoding="utf-8").splitlines()
    ids = {token: i for i, token in enumerate(tokens)}
    names = {f"{name}_token": f"[{name.upper()}]" for name in _SPECIAL[:5]}
    names |= {name: settings[name] for name in names if isinstance(settings.get(name), str)}
    absent = [token for token in names.values() if token not in ids]
    if absent:
        raise ValueError(f"AutoTokenizer.from_pretrained: {path} has no {', '.join(absent)}")
    inner = library.Tokenizer(library.models.WordPiece(ids, unk_token=names["unk_token"]))
    inner.normalizer = library.normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    inner.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    inner.decoder = library.decoders.WordPiece()
    cls, sep = names["cls_token"], names["sep_token"]
    inner.post_processor = library.processors.BertProcessing((sep, ids[sep]), (cls, ids[cls]))
    inner.add_special_tokens(list(names.values()))
    return inner, names


def _tokenizers(caller: str):
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            f"{caller} needs the tokenizers package: pip install 'slimkernels[train]'"
        ) from error
    return tokenizers
