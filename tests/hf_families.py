"""Tiny models of Hugging Face's families, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hf_configs import BART, BERT, DISTILBERT, GPT2, LLAMA, MODERNBERT, T5, VISION, V

B, L = 3, 11  # a padded batch
LENGTHS = (11, 6, 3)
REAL = torch.arange(L) < torch.tensor(LENGTHS)[:, None]


@dataclass(frozen=True)
class Family:
    """One model class with a tiny configuration.

    model    its class's name in transformers, and that of its configuration
    config   what a tiny one is given
    inputs   a function of this module that makes a batch
    swapped  classes, by the names that the report gives them, that must be among the swapped
    packs    whether it runs a padded batch on the real tokens alone
    generates  whether generate() is compared, too
    """

    model: str
    of: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    swapped: tuple[str, ...]
    packs: bool = False
    generates: bool = False

    def make(self) -> torch.nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.of)(**self.config)
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():  # so that no bias and no norm is trivial
            for p in model.parameters():
                if p.dim() == 1:
                    p.add_(0.2 * torch.randn_like(p))
                elif p.dim() > 1:
                    p.mul_(4.0)
            for name, buffer in model.named_buffers():
                if name == "final_logits_bias":
                    buffer.normal_()
        return model


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (B, L), generator=generator)
    return {"input_ids": torch.where(REAL, ids, 1), "attention_mask": REAL.long()}


def masked() -> dict[str, torch.Tensor]:
    """A batch with a label at about every third real token."""
    batch = tokens()
    wanted = (torch.arange(L) % 3 == 1) & REAL
    return {**batch, "labels": torch.where(wanted, batch["input_ids"], -100)}


def classified() -> dict[str, torch.Tensor]:
    return {**tokens(), "labels": torch.tensor([1, 0, 1])}


def causal() -> dict[str, torch.Tensor]:
    batch = tokens()
    return {**batch, "labels": batch["input_ids"].masked_fill(~REAL, -100)}


def translated() -> dict[str, torch.Tensor]:
    return {**tokens(), "labels": tokens()["input_ids"][:, 2:7].contiguous()}


def pretrained() -> dict[str, torch.Tensor]:
    return {**masked(), "next_sentence_label": torch.tensor([1, 0, 1])}


def tagged() -> dict[str, torch.Tensor]:
    batch = tokens()
    return {**batch, "labels": (batch["input_ids"] % 2).masked_fill(~REAL, -100)}


def answered() -> dict[str, torch.Tensor]:
    return {
        **tokens(),
        "start_positions": torch.tensor([1, 2, 0]),
        "end_positions": torch.tensor([9, 5, 2]),
    }


def chosen() -> dict[str, torch.Tensor]:
    batch = {name: torch.stack((t, t.roll(1, 0)), 1) for name, t in tokens().items()}
    return {**batch, "labels": torch.tensor([1, 0, 1])}


def image() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.tensor([1, 0])}


def pair() -> dict[str, torch.Tensor]:
    text = {name: t[:2] for name, t in tokens().items()}
    text["input_ids"][torch.arange(2), text["attention_mask"].sum(1) - 1] = 3  # where CLIP looks
    return {"pixel_values": image()["pixel_values"], **text}


def speech() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 8, 32, generator=generator)
    return {"input_features": features, "labels": tokens()["input_ids"][:2, :6].contiguous()}


_OUTPUT = ("SelfOutput", "Intermediate", "Stack", "Layer", "LayerNorm")

FAMILIES = {
    "bert-mlm": Family(
        "BertForMaskedLM", "BertConfig", BERT, masked, ("Embeddings", *_OUTPUT), packs=True
    ),
    "bert-cls": Family(
        "BertForSequenceClassification", "BertConfig", BERT, classified, _OUTPUT, packs=True
    ),
    "bert-tokens": Family(
        "BertForTokenClassification", "BertConfig", BERT, tagged, _OUTPUT, packs=True
    ),
    "bert-qa": Family("BertForQuestionAnswering", "BertConfig", BERT, answered, _OUTPUT),
    "bert-choice": Family("BertForMultipleChoice", "BertConfig", BERT, chosen, _OUTPUT, True),
    "bert-nsp": Family(
        "BertForNextSentencePrediction", "BertConfig", BERT, classified, _OUTPUT, packs=True
    ),
    "bert-pretraining": Family(
        "BertForPreTraining", "BertConfig", BERT, pretrained, _OUTPUT, packs=True
    ),
    "bert-decoder": Family(
        "BertLMHeadModel",
        "BertConfig",
        {**BERT, "is_decoder": True, "bos_token_id": 2, "eos_token_id": None},
        causal,
        ("SelfOutput", "Intermediate", "LayerNorm"),
        generates=True,
    ),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", BERT, masked, _OUTPUT, packs=True),
    "xlm-roberta": Family(
        "XLMRobertaForSequenceClassification",
        "XLMRobertaConfig",
        BERT,
        classified,
        _OUTPUT,
        packs=True,
    ),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        DISTILBERT,
        masked,
        ("Stack", "Layer", "LayerNorm", "GELUActivation"),
        packs=True,
    ),
    "albert": Family(
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0},
        masked,
        ("Stack", "Layer", "LayerNorm", "NewGELUActivation"),
        packs=True,
    ),
    "electra": Family(
        "ElectraForMaskedLM",
        "ElectraConfig",
        {**BERT, "embedding_size": 16},
        masked,
        _OUTPUT,
        packs=True,
    ),
    "electra-discriminator": Family(
        "ElectraForPreTraining",
        "ElectraConfig",
        {**BERT, "embedding_size": 32},
        tagged,
        _OUTPUT,
        packs=True,
    ),
    "deberta-v2": Family(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
        masked,
        ("SelfOutput", "Intermediate", "LayerNorm"),
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        MODERNBERT,
        masked,
        ("Stack", "RotaryLayer", "ModernBertMLP", "LayerNorm"),
        packs=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        causal,
        ("LayerNorm", "NewGELUActivation"),
        generates=True,
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**BERT, "hidden_dropout": 0.0, "attention_dropout": 0.0, "eos_token_id": None},
        causal,
        ("LayerNorm", "GELUActivation"),
        generates=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**LLAMA, "sliding_window": 4},
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        LLAMA,
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        # A window in which padding, too, sees a token: it is NaN in theirs, in float64.
        {**LLAMA, "sliding_window": 9, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
        causal,
        ("ZeroCenteredRMSNorm", "GatedMLP"),
        generates=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 8},
        causal,
        ("ZeroCenteredRMSNorm", "GatedMLP"),
        generates=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        LLAMA,
        causal,
        ("RMSNorm", "StackedGatedMLP"),
        generates=True,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        translated,
        ("T5RMSNorm", "Stack", "BiasedLayer"),
        packs=True,
        generates=True,
    ),
    "t5-gated": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        translated,
        ("T5RMSNorm", "T5GatedMLP", "Stack", "BiasedLayer"),
        packs=True,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
        translated,
        ("Stack", "PostNormEncoderLayer", "PostNormDecoderLayer", "GELUActivation"),
        packs=True,
        generates=True,
    ),
    "marian": Family(
        "MarianMTModel",
        "MarianConfig",
        {**BART, "activation_function": "gelu"},
        translated,
        ("Stack", "PostNormEncoderLayer", "PostNormDecoderLayer", "GELUActivation"),
        packs=True,
        generates=True,
    ),
    "pegasus": Family(
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        BART,
        translated,
        ("Stack", "PreNormEncoderLayer", "PreNormDecoderLayer", "GELUActivation"),
        packs=True,
        generates=True,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 24},
        speech,
        ("LayerNorm", "GELUActivation", "PreNormEncoderLayer"),
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**VISION, "patch_size": 4},
        image,
        ("LayerNorm", "GELUActivation"),
    ),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        dict(
            text_config={
                **{k: v for k, v in BERT.items() if "dropout" not in k},
                "bos_token_id": 2,
                "eos_token_id": 3,
                "projection_dim": 16,
            },
            vision_config={**VISION, "patch_size": 4, "projection_dim": 16},
            projection_dim=16,
        ),
        pair,
        ("LayerNorm",),
    ),
}
