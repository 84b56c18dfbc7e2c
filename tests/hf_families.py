"""Tiny models of Hugging Face's families, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

V, B, L = 61, 3, 11  # vocabulary, and a padded batch
LENGTHS = (11, 6, 3)


@dataclass(frozen=True)
class Family:
    """One model class with a tiny configuration.

    model    its class's name in transformers, and that of its configuration
    config   what a tiny one is given
    inputs   a function of this module that makes a batch
    swapped  classes, by the names that the report gives them, that must be among the swapped
    packs    whether its encoder runs a padded batch on the real tokens alone
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


def _mask() -> torch.Tensor:
    return (torch.arange(L) < torch.tensor(LENGTHS)[:, None]).long()


def tokens() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, V, (B, L), generator=generator)
    mask = _mask()
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def masked() -> dict[str, torch.Tensor]:
    """A batch with a label at about every third real token."""
    batch = tokens()
    wanted = (torch.arange(L) % 3 == 1) & (batch["attention_mask"] == 1)
    return {**batch, "labels": torch.where(wanted, batch["input_ids"], -100)}


def classified() -> dict[str, torch.Tensor]:
    return {**tokens(), "labels": torch.tensor([1, 0, 1])}


def causal() -> dict[str, torch.Tensor]:
    batch = tokens()
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def translated() -> dict[str, torch.Tensor]:
    return {**tokens(), "labels": tokens()["input_ids"][:, 2:7].contiguous()}


def pretrained() -> dict[str, torch.Tensor]:
    return {**masked(), "next_sentence_label": torch.tensor([1, 0, 1])}


def tagged() -> dict[str, torch.Tensor]:
    batch = tokens()
    return {**batch, "labels": (batch["input_ids"] % 2).masked_fill(_mask() == 0, -100)}


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


_BERT = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    pad_token_id=1,
)
_LLAMA = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=32,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=None,
)
_BART = dict(
    vocab_size=V,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=32,
    dropout=0.0,
    attention_dropout=0.0,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=3,
    decoder_start_token_id=3,
    forced_eos_token_id=None,
)
_T5 = dict(
    vocab_size=V,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=8,
    dropout_rate=0.0,
    pad_token_id=1,
    eos_token_id=3,
    decoder_start_token_id=1,
)
_VISION = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16
)
_OUTPUT = ("SelfOutput", "Intermediate", "Stack", "Layer", "LayerNorm")

FAMILIES = {
    "bert-mlm": Family(
        "BertForMaskedLM", "BertConfig", _BERT, masked, ("Embeddings", *_OUTPUT), packs=True
    ),
    "bert-cls": Family(
        "BertForSequenceClassification", "BertConfig", _BERT, classified, _OUTPUT, packs=True
    ),
    "bert-tokens": Family(
        "BertForTokenClassification", "BertConfig", _BERT, tagged, _OUTPUT, packs=True
    ),
    "bert-qa": Family("BertForQuestionAnswering", "BertConfig", _BERT, answered, _OUTPUT),
    "bert-choice": Family("BertForMultipleChoice", "BertConfig", _BERT, chosen, _OUTPUT, True),
    "bert-nsp": Family(
        "BertForNextSentencePrediction", "BertConfig", _BERT, classified, _OUTPUT, packs=True
    ),
    "bert-pretraining": Family(
        "BertForPreTraining", "BertConfig", _BERT, pretrained, _OUTPUT, packs=True
    ),
    "bert-decoder": Family(
        "BertLMHeadModel",
        "BertConfig",
        {**_BERT, "is_decoder": True, "bos_token_id": 2, "eos_token_id": None},
        causal,
        _OUTPUT,
        generates=True,
    ),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", _BERT, masked, _OUTPUT, packs=True),
    "xlm-roberta": Family(
        "XLMRobertaForSequenceClassification",
        "XLMRobertaConfig",
        _BERT,
        classified,
        _OUTPUT,
        packs=True,
    ),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        dict(
            vocab_size=V,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            pad_token_id=1,
        ),
        masked,
        ("Stack", "Layer", "LayerNorm", "GELUActivation"),
        packs=True,
    ),
    "albert": Family(
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**_BERT, "embedding_size": 16, "classifier_dropout_prob": 0.0},
        masked,
        ("Stack", "Layer", "LayerNorm", "NewGELUActivation"),
        packs=True,
    ),
    "electra": Family(
        "ElectraForMaskedLM",
        "ElectraConfig",
        {**_BERT, "embedding_size": 16},
        masked,
        _OUTPUT,
        packs=True,
    ),
    "electra-discriminator": Family(
        "ElectraForPreTraining",
        "ElectraConfig",
        {**_BERT, "embedding_size": 32},
        tagged,
        _OUTPUT,
        packs=True,
    ),
    "deberta-v2": Family(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
        masked,
        ("SelfOutput", "Intermediate", "LayerNorm"),
    ),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        dict(
            vocab_size=V,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            local_attention=4,
            global_attn_every_n_layers=3,
            pad_token_id=1,
            bos_token_id=2,
            cls_token_id=2,
            eos_token_id=3,
            sep_token_id=3,
        ),
        masked,
        ("Stack", "RotaryLayer", "ModernBertMLP", "LayerNorm"),
        packs=True,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        dict(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=None,
        ),
        causal,
        ("LayerNorm", "NewGELUActivation"),
        generates=True,
    ),
    "gpt-neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_BERT, "hidden_dropout": 0.0, "attention_dropout": 0.0, "eos_token_id": None},
        causal,
        ("LayerNorm", "GELUActivation"),
        generates=True,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        _LLAMA,
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        {**_LLAMA, "sliding_window": 4},
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _LLAMA,
        causal,
        ("RMSNorm", "GatedMLP", "LlamaDecoderLayer"),
        generates=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
        causal,
        ("ZeroCenteredRMSNorm", "GatedMLP"),
        generates=True,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 8},
        causal,
        ("ZeroCenteredRMSNorm", "GatedMLP"),
        generates=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        _LLAMA,
        causal,
        ("RMSNorm", "StackedGatedMLP"),
        generates=True,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        translated,
        ("T5RMSNorm", "Stack", "BiasedLayer"),
        packs=True,
        generates=True,
    ),
    "t5-gated": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        translated,
        ("T5RMSNorm", "T5GatedMLP", "Stack", "BiasedLayer"),
        packs=True,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
        translated,
        ("Stack", "PostNormEncoderLayer", "PostNormDecoderLayer", "GELUActivation"),
        packs=True,
        generates=True,
    ),
    "marian": Family(
        "MarianMTModel",
        "MarianConfig",
        {**_BART, "activation_function": "gelu"},
        translated,
        ("Stack", "PostNormEncoderLayer", "PostNormDecoderLayer", "GELUActivation"),
        packs=True,
        generates=True,
    ),
    "pegasus": Family(
        "PegasusForConditionalGeneration",
        "PegasusConfig",
        _BART,
        translated,
        ("Stack", "PreNormEncoderLayer", "PreNormDecoderLayer", "GELUActivation"),
        packs=True,
        generates=True,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 24},
        speech,
        ("LayerNorm", "GELUActivation", "PreNormEncoderLayer"),
    ),
    "vit": Family(
        "ViTForImageClassification",
        "ViTConfig",
        {**_VISION, "patch_size": 4},
        image,
        ("LayerNorm", "GELUActivation"),
    ),
    "clip": Family(
        "CLIPModel",
        "CLIPConfig",
        dict(
            text_config={
                **{k: v for k, v in _BERT.items() if "dropout" not in k},
                "bos_token_id": 2,
                "eos_token_id": 3,
                "projection_dim": 16,
            },
            vision_config={**_VISION, "patch_size": 4, "projection_dim": 16},
            projection_dim=16,
        ),
        pair,
        ("LayerNorm",),
    ),
}
