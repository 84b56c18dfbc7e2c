import pytest
import torch

from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig

LENGTHS = (7, 1, 12, 9)
VOCAB = 97


@pytest.fixture
def config():
    """Small, without dropout; odd sizes."""
    return TransformerConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        intermediate_size=80,
        max_positions=14,
        dropout_p=0.0,
        attention_dropout_p=0.0,
    )


@pytest.fixture
def model(config):
    """Every parameter random, so that none can be left out unseen."""
    torch.manual_seed(0)
    model = BertForPreTraining(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model


@pytest.fixture
def batch():
    """What BertForPreTraining.forward takes: four sequences, one of a single token."""
    generator = torch.Generator().manual_seed(1)
    T = sum(LENGTHS)
    masked_positions = torch.tensor([1, 3, 7, 10, 19, 27])
    return {
        "input_ids": torch.randint(1, VOCAB, (T,), generator=generator),
        "segment_ids": torch.randint(0, 2, (T,), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS]),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32),
        "masked_positions": masked_positions,
        "masked_labels": torch.randint(0, VOCAB, masked_positions.shape, generator=generator),
        "next_sentence_labels": torch.tensor([0, 1, 1, 0]),
    }


@pytest.fixture
def rectangles(batch):
    """The batch padded (B, T), under Hugging Face's names; what stands under padding is random."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(max(LENGTHS) + 2) < lengths[:, None]
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["masked_positions"]] = batch["masked_labels"]

    def rectangle(ragged, limit):
        full = torch.randint(0, limit, mask.shape, generator=generator)
        full[mask] = ragged
        return full

    return {
        "input_ids": rectangle(batch["input_ids"], VOCAB),
        "attention_mask": mask.long(),
        "token_type_ids": rectangle(batch["segment_ids"], 2),
        "labels": rectangle(labels, 1).where(mask, -100),
        "next_sentence_label": batch["next_sentence_labels"],
    }
