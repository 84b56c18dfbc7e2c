"""The models and batches of families.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import slimkernels
from slimkernels.testing import assert_no_worse

WORK = ("inference", "training")
V, B, L = 30522, 16, 128
_QUICK_V = 512


class Family(NamedTuple):
    """model, config: names in transformers; width: what the config calls its sizes; kind: batch."""

    model: str
    config: str
    width: str = "bert"
    kind: str = "masked"
    more: dict = {}


# Names of (hidden size, layers, heads, intermediate size) in configurations.
_SIZES = {
    "bert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "gpt": ("n_embd", "n_layer", "n_head", "n_inner"),
    "distil": ("dim", "n_layers", "n_heads", "hidden_dim"),
    "t5": ("d_model", "num_layers", "num_heads", "d_ff"),
}
_BART = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
_DECODER = ("", "decoder_layers", "decoder_attention_heads", "decoder_ffn_dim")
_LLAMA = {"num_key_value_heads": 4, "head_dim": 32}
_SEQ2SEQ = {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "bos_token_id": 2}

FAMILIES = {
    "BERT": Family("BertForMaskedLM", "BertConfig"),
    "RoBERTa": Family("RobertaForMaskedLM", "RobertaConfig", more={"pad_token_id": 1}),
    "XLM-R": Family("XLMRobertaForMaskedLM", "XLMRobertaConfig", more={"pad_token_id": 1}),
    "DistilBERT": Family("DistilBertForMaskedLM", "DistilBertConfig", "distil"),
    "ALBERT": Family("AlbertForMaskedLM", "AlbertConfig"),
    "ELECTRA": Family("ElectraForMaskedLM", "ElectraConfig"),
    "DeBERTa-v2": Family(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        more={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "ModernBERT": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        more={n: 0 for n in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id")}
        | {"sep_token_id": 0},
    ),
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config", "gpt", "causal"),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", kind="causal"),
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", "bert", "causal", _LLAMA),
    "Mistral": Family("MistralForCausalLM", "MistralConfig", "bert", "causal", _LLAMA),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", "bert", "causal", _LLAMA),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", "bert", "causal", _LLAMA),
    "Gemma 2": Family("Gemma2ForCausalLM", "Gemma2Config", "bert", "causal", _LLAMA),
    "Gemma 3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", "bert", "causal", _LLAMA),
    "Phi-3": Family(
        "Phi3ForCausalLM", "Phi3Config", "bert", "causal", {**_LLAMA, "pad_token_id": 0}
    ),
    "T5": Family(
        "T5ForConditionalGeneration", "T5Config", "t5", "seq2seq", {"d_kv": 32, **_SEQ2SEQ}
    ),
    "BART": Family("BartForConditionalGeneration", "BartConfig", "bart", "seq2seq", _SEQ2SEQ),
    "Marian": Family("MarianMTModel", "MarianConfig", "bart", "seq2seq", _SEQ2SEQ),
    "Pegasus": Family(
        "PegasusForConditionalGeneration", "PegasusConfig", "bart", "seq2seq", _SEQ2SEQ
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        "bart",
        "speech",
        {**_SEQ2SEQ, "max_source_positions": 256},
    ),
    "ViT": Family("ViTForImageClassification", "ViTConfig", kind="image"),
    "CLIP": Family("CLIPModel", "CLIPConfig", "clip", "pair"),
}


def has_sdpa(name: str) -> bool:
    import transformers

    return getattr(transformers, FAMILIES[name].model)._supports_sdpa


def make(name: str, attention: str, quick: bool = False) -> nn.Module:
    """The family's model; the same weights each time. Without sdpa it has eager's attention."""
    import transformers

    family = FAMILIES[name]
    attention = attention if has_sdpa(name) else "eager"
    words = _QUICK_V if quick else V
    size = (64, 2, 4, 128) if quick else (384, 6, 12, 1536)
    config = {**family.more}
    if family.width == "clip":
        part = dict(zip(_SIZES["bert"], size, strict=True))
        config |= {"text_config": {**part, "vocab_size": words}, "vision_config": part}
    elif family.width == "bart":
        for names in (_BART, _DECODER):
            config |= {n: v for n, v in zip(names, size, strict=True) if n}
    else:
        config |= dict(zip(_SIZES[family.width], size, strict=True))
    if family.kind not in ("image", "pair"):
        config["vocab_size"] = words
    torch.manual_seed(0)
    made = getattr(transformers, family.config)(**config)
    return getattr(transformers, family.model)._from_config(made, attn_implementation=attention)


def batch_of(name: str, quick: bool, labels: bool) -> dict[str, Tensor]:
    """Sequences of 10 % to 60 % of the longest, which is one."""
    kind = FAMILIES[name].kind
    rows, length = (4, 32) if quick else (B, L)
    generator = torch.Generator().manual_seed(0)
    share = torch.linspace(0.1, 0.6, rows)
    share[-1] = 1.0
    seen = torch.arange(length) < (share * length).round().clamp(min=2)[:, None]
    ids = torch.randint(
        10, _QUICK_V if quick else V, (rows, length), generator=generator
    ).masked_fill(~seen, 1)
    text = {"input_ids": ids, "attention_mask": seen.long()}
    pixels = {"pixel_values": torch.randn(4, 3, 224, 224, generator=generator)}
    if kind == "image":
        return {**pixels, "labels": torch.arange(4) % 2} if labels else pixels
    if kind == "pair":
        text = {n: t[:4, :64].contiguous() for n, t in text.items()}
        return {**text, **pixels} | ({"return_loss": True} if labels else {})
    targets = ids[:, : length // 2].contiguous()
    if kind == "speech":
        features = torch.randn(4, 80, 512, generator=generator)
        decoder = {"labels": targets[:4]} if labels else {"decoder_input_ids": targets[:4]}
        return {"input_features": features, **decoder}
    if kind == "seq2seq":
        return {**text, **({"labels": targets} if labels else {"decoder_input_ids": targets})}
    if not labels:
        return text
    kept = seen if kind == "causal" else seen & (torch.rand(seen.shape, generator=generator) < 0.15)
    kept[:, 1] = True
    no_cache = {"use_cache": False} if kind == "causal" else {}  # as the Trainer has it
    return {**text, "labels": ids.masked_fill(~kept, -100), **no_cache}


def step(name: str, work: str, provider: str, quick: bool, device) -> Callable[[], None]:
    """What is timed: a function that runs once."""
    model = make(name, "eager" if provider == "eager" else "sdpa", quick).to(device)
    if provider == "slim":
        slimkernels.replace(model)
    training = work == "training"
    if not training and FAMILIES[name].kind in ("masked", "causal"):
        model = model.base_model  # what a program wants of a batch: its hidden states
    called = torch.compile(model, dynamic=False) if provider == "compiled" else model
    batch = batch_of(name, quick, labels=training)
    batch = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in batch.items()}
    if not training:
        model.eval()

        def infer():
            with torch.inference_mode():
                called(**batch)

        return infer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def train():
        called(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def run_twice(name: str, work: str, provider: str, quick: bool, device: str) -> None:
    run = step(name, work, provider, quick, torch.device(device))
    for _ in range(2):
        run()


def gate(name: str, quick: bool, device) -> tuple[str, str, str]:
    """(verdict, swapped, left): is the loss as near to float64's as Hugging Face's own?"""
    batch = batch_of(name, True, labels=True)
    batch = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in batch.items()}

    def loss(model):
        widened = {
            n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in batch.items()
        }
        wide = next(model.parameters()).dtype == torch.float64
        return model.eval()(**(widened if wide else batch)).loss.detach()

    model = make(name, "sdpa", quick).to(device)
    eager, truth = loss(model), loss(make(name, "sdpa", quick).to(device).double())
    rows = slimkernels.replace(model)
    details = {part for row in rows.swapped for part in row.detail.split("; ")}
    swapped = sorted({part.rpartition(".")[2] for part in details})
    parts = {id(m) for m in model.modules() if any(True for _ in m.children())}
    paths = dict(model.named_modules())
    left = sorted({r.kind.rpartition(".")[2] for r in rows.left if id(paths[r.path]) not in parts})
    verdict = "pass"
    try:  # one number, whose error is chance: two units in the last place are allowed to all
        floor = 2 * torch.finfo(eager.dtype).eps * truth.abs().item()
        assert_no_worse(loss(model), eager, truth, floor=floor, what="loss")
    except AssertionError as error:
        verdict = f"FAIL {error}"
    return verdict, ", ".join(swapped), ", ".join(left)
