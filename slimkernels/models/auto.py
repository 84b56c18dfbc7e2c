"""The class for a folder, by its config.json: AutoModelForCausalLM.from_pretrained(path)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from slimkernels.models import bert_heads, files, gpt, seq2seq
from slimkernels.models.pretrained import Pretrained


class _Auto:
    """Chooses among `classes` by the model_type that each one's family has."""

    classes: ClassVar[tuple[type[Pretrained], ...]]

    @classmethod
    def from_pretrained(cls, path: str | Path, **options) -> Pretrained:
        """What the class for this folder's from_pretrained gives; the options are that one's.

        Errors  ValueError for a model_type that no class here is for
        """
        caller = f"{cls.__name__}.from_pretrained"
        folder = files.folder_of(path, caller)
        kind = files.read_json(folder / files.CONFIG, caller).get("model_type")
        known = {model.family.model_type: model for model in cls.classes}
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(
                f"{caller}: model_type in {folder / files.CONFIG} must be {' or '.join(known)}; "
                f"got {kind!r}"
            )
        return known[kind].from_pretrained(folder, **options)


class AutoModel(_Auto):
    classes = (bert_heads.BertModel,)


class AutoModelForMaskedLM(_Auto):
    classes = (bert_heads.BertForMaskedLM,)


class AutoModelForSequenceClassification(_Auto):
    classes = (bert_heads.BertForSequenceClassification,)


class AutoModelForTokenClassification(_Auto):
    classes = (bert_heads.BertForTokenClassification,)


class AutoModelForQuestionAnswering(_Auto):
    classes = (bert_heads.BertForQuestionAnswering,)


class AutoModelForCausalLM(_Auto):
    classes = (gpt.GPT2LMHeadModel, gpt.LlamaForCausalLM)


class AutoModelForSeq2SeqLM(_Auto):
    classes = (seq2seq.T5ForConditionalGeneration, seq2seq.BartForConditionalGeneration)
