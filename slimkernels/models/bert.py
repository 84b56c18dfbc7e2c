"""BERT (Devlin et al. 2019), without padding from the embedding to the loss.

A batch is ragged: the tokens of all sequences laid end to end, and cu_seqlens saying where each
begins. Every product, norm and activation then works on real tokens only, attention stays within
a sequence, and what only the losses read is computed only where they read it: the vocabulary
matrix, a third of the work in a small BERT, meets the masked positions alone, and so does most of
the last block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimkernels.models.block import Block, Wanted, activate, affine, initialise
from slimkernels.models.checks import (
    check_batch,
    check_ids,
    check_labels,
    check_masked,
    check_next_sentences,
    check_padded,
)
from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert_bert import BERT
from slimkernels.models.embedding import Embedded, Embedding
from slimkernels.models.padding import unpad
from slimkernels.models.pretrained import Pretrained
from slimkernels.nn import LayerNorm
from slimkernels.ops.cross_entropy import cross_entropy
from slimkernels.ops.linear import linear


class Bert(nn.Module):
    """The encoder: token ids to hidden states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of a ragged batch, or of a padded one.

        input_ids     (T,) int64 with cu_seqlens, or (B, T) with or without key_lengths
        segment_ids   like input_ids; 0 everywhere if None
        position_ids  like input_ids; counted from 0 in each sequence if None
        cu_seqlens    (B+1,) int32: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
        key_lengths   (B,) int32: tokens of row i at and after key_lengths[i] are padding, which
                      is computed but which no token attends to
        Returns       (T, C) or (B, T, C)
        Errors        ValueError for a wrong shape, an empty batch, key_lengths with cu_seqlens, or,
                      on the CPU, an id out of range; on a GPU, where looking would wait for the
                      device, an id out of range is torch's device-side assertion
        """
        if cu_seqlens is not None and key_lengths is not None:
            raise ValueError(
                "Bert: key_lengths must be None with cu_seqlens, which has the lengths"
            )
        embedded = self.embed(input_ids, segment_ids, position_ids, cu_seqlens)
        return self.encode(embedded, cu_seqlens=cu_seqlens, key_lengths=key_lengths)

    def embed(
        self, input_ids, segment_ids, position_ids, cu_seqlens, *, multiplies: bool = False
    ) -> Embedded:
        """Hidden states before the first block, and the token table for the tied decoder; what
        multiplies says, Embedding.forward explains."""
        ids = self.ids(input_ids, segment_ids, position_ids, cu_seqlens)
        return self.embedding(*ids, multiplies=multiplies)

    def ids(
        self, input_ids, segment_ids, position_ids, cu_seqlens
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Ids of tokens, segments and positions, checked, with what was None in its place."""
        check_batch(self.config, input_ids, cu_seqlens)
        if segment_ids is None:
            segment_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = positions(input_ids, cu_seqlens)
        like = tuple(input_ids.shape)
        check_ids("segment_ids", segment_ids, self.config.type_vocab_size, like)
        check_ids("position_ids", position_ids, self.config.max_positions, like)
        return input_ids, segment_ids, position_ids

    def encode(
        self, embedded: Embedded, wanted: Wanted | None = None, **lengths: Tensor | None
    ) -> Tensor:
        """Hidden states after the last block; `wanted` and `lengths` are what Block.forward takes.

        Returns  (T, C) or (B, T, C); (Q, C), in the order of wanted.positions, if that is given
        """
        hidden, residual, _ = embedded
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            only = wanted if i == last else None
            hidden, residual = layer(hidden, residual, wanted=only, **lengths)
        return hidden


def positions(input_ids: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's place in its sequence; no wait for the device."""
    T = input_ids.shape[-1]
    count = torch.arange(T, device=input_ids.device)
    if cu_seqlens is None:
        return count.expand(input_ids.shape)
    starts = cu_seqlens[:-1].to(count.dtype)
    # output_size, because without it the device is asked for the sum of the lengths.
    return count - starts.repeat_interleave(cu_seqlens.diff(), output_size=T)


class BertBased(Pretrained):
    """A BERT with a head, which reads the encoder's hidden states of a padded batch unpadded."""

    family = BERT
    body = "bert."

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config)

    def add_token_head(self) -> None:
        """The parts of mlm_logits. The matrix is the token embedding; only its bias is its own."""
        config = self.config
        self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def mlm_logits(self, hidden: Tensor, decoder_weight: Tensor | None = None) -> Tensor:
        """(K, V) scores of every token for K hidden states (K, C).

        decoder_weight  the token embedding as embed() returned it, which saves a pass over its
                        gradient; the parameter itself if None
        """
        norm = self.transform_norm
        if decoder_weight is None:
            decoder_weight = self.bert.embedding.token.weight
        x = norm(activate(hidden, self.transform, self.config.activation))
        return linear(x, decoder_weight, self.decoder_bias)

    def add_pooler(self) -> None:
        """The part of pool()."""
        self.pooler = nn.Linear(self.config.hidden_size, self.config.hidden_size)

    def pool(self, first: Tensor) -> Tensor:
        """(B, C) for a whole sequence, from its first token's hidden states (B, C)."""
        return torch.tanh(affine(self.pooler, first))


class PretrainingOutput(NamedTuple):
    """Scalars. loss is mlm_loss + nsp_loss in float32 at least; nsp_loss is 0 without labels."""

    loss: Tensor
    mlm_loss: Tensor
    nsp_loss: Tensor


class BertForPreTraining(BertBased):
    """The encoder with BERT's two heads: masked tokens (MLM) and next sentences (NSP)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.add_pooler()
        self.next_sentence = nn.Linear(config.hidden_size, 2)
        self.add_token_head()
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor,
        masked_positions: Tensor,
        masked_labels: Tensor,
        next_sentence_labels: Tensor | None = None,
    ) -> PretrainingOutput:
        """The pretraining losses of a ragged batch.

        input_ids, segment_ids, position_ids, cu_seqlens  as in Bert.forward, ragged
        masked_positions      (K,) int64, indices into T: where the MLM head predicts
        masked_labels         (K,) int64, the ids that stood there; -100 is left out of the mean
        next_sentence_labels  (B,) int64, 0 where the second segment follows the first, else 1
        Returns               PretrainingOutput; mlm_loss is NaN where nothing is to be predicted
        Errors                ValueError, as in Bert.forward
        """
        if cu_seqlens is None:
            raise ValueError("Bert: cu_seqlens must be given; forward_padded takes padded batches")
        ids = self.bert.ids(input_ids, segment_ids, position_ids, cu_seqlens)
        tokens, sequences = len(input_ids), len(cu_seqlens) - 1
        check_masked(self.config, tokens, masked_positions, masked_labels)
        check_next_sentences("next_sentence_labels", next_sentence_labels, sequences)
        embedded = self.bert.embedding(*ids, multiplies=True)
        # Each sequence's first token, for the pair, and the masked ones: nobody reads the others.
        read = masked_positions
        if next_sentence_labels is not None:
            read = torch.cat([cu_seqlens[:-1].to(read.dtype), read])
        ascending, order = read.sort()
        ends = torch.searchsorted(ascending, cu_seqlens.to(read.dtype)).to(torch.int32)
        hidden = self.bert.encode(embedded, Wanted(ascending, ends), cu_seqlens=cu_seqlens)
        hidden = hidden.index_select(0, order.argsort())  # in the order of `read`
        first, masked = hidden.tensor_split([len(read) - len(masked_positions)])
        # Not linear_cross_entropy: on the CPU, forward and backward with C = 768 and V = 30522, it
        # takes the same processor time (1.00 and 1.01 at K = 160 and 640 in float32, 1.01 and 0.98
        # under bfloat16 autocast), and below its kernel's limit more; on a GPU nobody has measured.
        mlm_loss = cross_entropy(self.mlm_logits(masked, embedded.table), masked_labels)
        if next_sentence_labels is None:
            nsp_loss = mlm_loss.new_zeros(())
        else:
            nsp_loss = cross_entropy(self.nsp_logits(first), next_sentence_labels)
        # Half precision would round the sum to three digits.
        wide = torch.promote_types(mlm_loss.dtype, torch.float32)
        return PretrainingOutput(mlm_loss.to(wide) + nsp_loss.to(wide), mlm_loss, nsp_loss)

    def nsp_logits(self, first: Tensor) -> Tensor:
        """(B, 2) scores from the hidden states (B, C) of each sequence's first token."""
        return affine(self.next_sentence, self.pool(first))

    def forward_padded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> PretrainingOutput:
        """The same losses from a padded batch, under Hugging Face's names; padding is cut out.

        input_ids            (B, T) int64
        attention_mask       (B, T): 0 where there is padding, wherever it stands; none if None
        token_type_ids       (B, T) int64; 0 everywhere if None
        labels               (B, T) int64, -100 where nothing is to be predicted
        next_sentence_label  (B,) int64
        Returns              PretrainingOutput, the numbers of forward() on the real tokens; the
                             pooled token is each row's first real one
        Errors               ValueError, as in Bert.forward
        Caution              waits for the device once or twice: it must tell the host how many
                             tokens are real, and how many of them are to be predicted
        """
        check_padded(input_ids, attention_mask, token_type_ids)
        if labels is None:
            raise ValueError("Bert: labels must be given, -100 where nothing is to be predicted")
        check_labels("labels", labels, self.config.vocab_size, tuple(input_ids.shape))
        check_next_sentences("next_sentence_label", next_sentence_label, len(input_ids))
        ragged = unpad(input_ids, attention_mask)
        labels = ragged.take(labels)
        masked_positions = (labels != -100).nonzero().squeeze(1)
        return self(
            ragged.take(input_ids),
            ragged.take(token_type_ids),
            ragged.position_ids,
            ragged.cu_seqlens,
            masked_positions,
            labels.index_select(0, masked_positions),
            next_sentence_label,
        )

    @torch.no_grad()
    def predict_masked(
        self, input_ids: Tensor, position: int, segment_ids: Tensor | None = None
    ) -> Tensor:
        """(V,) scores of every token for the place `position` of one sequence.

        input_ids, segment_ids  (T,) int64, as in Bert.forward
        Caution                 drops out in training mode: call eval() before
        """
        T = input_ids.shape[0]
        check_ids("position", torch.tensor([position]), T)
        cu_seqlens = torch.tensor([0, T], dtype=torch.int32, device=input_ids.device)
        hidden = self.bert(input_ids, segment_ids, None, cu_seqlens)
        return self.mlm_logits(hidden[position : position + 1])[0]
