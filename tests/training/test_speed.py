"""The speed comparison sets like against like: one loss, with and without padding."""

import pytest
import torch

from slimkernels.data import Batch
from slimkernels.dispatch import use_backend
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.testing import assert_no_worse
from slimkernels.training.loop import ragged_losses
from slimkernels.training.speed import padded_losses

VOCABULARY = 60


def batch_of(*lengths):
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    T = int(cu_seqlens[-1])
    return Batch(
        input_ids=torch.randint(VOCABULARY, (T,)),
        segment_ids=torch.randint(2, (T,)),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=cu_seqlens,
        masked_positions=torch.arange(1, T, 3),
        masked_labels=torch.randint(VOCABULARY, (len(range(1, T, 3)),)),
        next_sentence_labels=torch.arange(len(lengths)) % 2,
    )


@pytest.mark.parametrize("lengths", [(9, 3, 14), (6, 6)], ids=["padding", "none"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_padded_losses_are_the_ragged_ones(backend, lengths):
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=16,
        initializer_std=0.2,
    )
    torch.manual_seed(1)
    model, batch = BertForPreTraining(config).eval(), batch_of(*lengths)
    weight = model.bert.layers[0].qkv.weight

    def results(losses):
        with use_backend(backend):
            output = losses(model, batch)
            gradient = torch.autograd.grad(output.loss, weight)[0]
        return torch.stack(tuple(output)), gradient

    padded, ragged = results(padded_losses), results(ragged_losses)
    model.double()
    weight = model.bert.layers[0].qkv.weight
    truth = results(ragged_losses)
    for actual, expected, exact in zip(padded, ragged, truth, strict=True):
        assert_no_worse(actual, expected, exact)
