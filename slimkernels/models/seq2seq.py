"""Encoder-decoders: T5 (Raffel et al. 2020) and BART (Lewis et al. 2020), from the one block.

Source and target are computed without their padding, the decoder no further than a row's last
label, and generation keeps the keys and values of its own tokens and of the encoder's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.models.bert import positions
from slimkernels.models.block import Memory, initialise
from slimkernels.models.cache import Cache
from slimkernels.models.checks import check_batch, check_ids, check_labels, check_padded
from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert_seq2seq import BART, T5
from slimkernels.models.generate import Begun, Generates
from slimkernels.models.outputs import Seq2SeqOutput
from slimkernels.models.padding import unpad
from slimkernels.models.pretrained import Pretrained
from slimkernels.models.stack import Stack
from slimkernels.models.vocabulary import Vocabulary


class Seq2SeqLM(Generates, Pretrained):
    """An encoder, and a decoder that reads it and scores every token for each next place."""

    body = ("encoder.", "decoder.")
    has_logits_bias = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Stack(config, config.num_layers, is_causal=False)
        self.decoder = Stack(
            *(config, config.num_decoder_layers),
            is_causal=True,
            reads_memory=True,
            token=self.encoder.embedding.token,
        )
        self.vocabulary = Vocabulary(config, has_bias=self.has_logits_bias)
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        decoder_cu_seqlens: Tensor | None = None,
        skip_logits: bool = False,
    ) -> Seq2SeqOutput:
        """Logits for the target of each source, and with labels the loss.

        input_ids               (B, S) int64, or (N, ) with cu_seqlens
        attention_mask          (B, S): 0 where there is padding
        decoder_input_ids       (B, T), or (M,) with decoder_cu_seqlens; None for the labels one
                                place later, after the start token
        decoder_attention_mask  (B, T): 0 where there is padding; None with labels for what comes
                                after a row's last label, which nothing that counts can see
        labels                  like decoder_input_ids, -100 for none
        cu_seqlens, decoder_cu_seqlens
                                (B+1,) int32: ragged batches, both or none
        skip_logits             with labels: logits are None, and are never stored
        Returns                 logits (B, T, V) or (M, V) and the encoder's hidden states, 0 on
                                padding; the loss is a mean over labels
        Errors                  ValueError for a wrong shape, an empty row or, on the CPU, an id out
                                of range
        Caution                 waits for the device if there is a mask or there are labels
        """
        name = type(self).__name__
        if labels is None and decoder_input_ids is None:
            raise ValueError(f"{name}: decoder_input_ids or labels must be given; got neither")
        if labels is None and skip_logits:
            raise ValueError(f"{name}: labels must be given with skip_logits; got None")
        if (cu_seqlens is None) != (decoder_cu_seqlens is None):
            raise ValueError(f"{name}: cu_seqlens and decoder_cu_seqlens must come together")
        if decoder_input_ids is None:
            decoder_input_ids = self._shifted(labels, decoder_cu_seqlens)
        if labels is not None:
            shape = tuple(decoder_input_ids.shape)
            why = " like decoder_input_ids"
            check_labels("labels", labels, self.config.vocab_size, shape, why, model=name)
        if cu_seqlens is not None:
            if attention_mask is not None or decoder_attention_mask is not None:
                raise ValueError(f"{name}: masks must be None with cu_seqlens")
            memory = self._encoded(input_ids, None, cu_seqlens)
            hidden, table = self._decoded(decoder_input_ids, None, decoder_cu_seqlens, memory)
            logits, loss = self._scored(hidden, table, labels, skip_logits)
            return Seq2SeqOutput(loss, logits, memory.hidden)
        if decoder_attention_mask is None and labels is not None:
            decoder_attention_mask = _up_to_last(labels != -100)
        check_padded(input_ids, attention_mask, model=name)
        check_padded(decoder_input_ids, decoder_attention_mask, model=name)
        source = unpad(input_ids, attention_mask)
        target = unpad(decoder_input_ids, decoder_attention_mask)
        if source.shape[0] != target.shape[0]:
            raise ValueError(
                f"{name}: decoder_input_ids must have {source.shape[0]} rows like input_ids; "
                f"got {target.shape[0]}"
            )
        ids = source.take(input_ids), source.position_ids, source.cu_seqlens
        memory = self._encoded(*ids)
        ids = target.take(decoder_input_ids), target.position_ids, target.cu_seqlens
        hidden, table = self._decoded(*ids, memory)
        logits, loss = self._scored(hidden, table, target.take(labels), skip_logits)
        logits = None if logits is None else target.put_back(logits)
        return Seq2SeqOutput(loss, logits, source.put_back(memory.hidden))

    def _scored(self, hidden, table, labels, skip_logits):
        if labels is None:
            return self.vocabulary(hidden, table), None
        return self.vocabulary.loss(hidden, table, labels, skip_logits=skip_logits)

    def _encoded(self, input_ids, position_ids, cu_seqlens) -> Memory:
        ids = self._checked(input_ids, position_ids, cu_seqlens)
        return Memory(self.encoder(*ids, cu_seqlens=cu_seqlens)[0], cu_seqlens)

    def _decoded(self, input_ids, position_ids, cu_seqlens, memory, cache=None):
        ids = self._checked(input_ids, position_ids, cu_seqlens)
        return self.decoder(*ids, cu_seqlens=cu_seqlens, memory=memory, cache=cache)

    def _checked(self, input_ids, position_ids, cu_seqlens):
        name, config = type(self).__name__, self.config
        check_batch(config, input_ids, cu_seqlens, model=name)
        if position_ids is None:
            position_ids = positions(input_ids, cu_seqlens)
        if config.positions != "relative":
            check_ids("position_ids", position_ids, config.max_positions, model=name)
        return input_ids, position_ids

    def _shifted(self, labels, cu_seqlens):
        """The labels one place later, after the start token: what the decoder reads in training."""
        start, pad = self._entry("decoder_start_token_id"), self._entry("pad_token_id")
        if not isinstance(labels, Tensor):
            raise ValueError(f"{type(self).__name__}: labels must be a tensor; got {labels!r}")
        ids = labels.roll(1, -1).masked_fill(labels.roll(1, -1) == -100, pad)
        if cu_seqlens is not None:
            return ids.index_fill(0, cu_seqlens[:-1].long(), start)
        return torch.cat([torch.full_like(ids[:, :1], start), ids[:, 1:]], 1)

    def _entry(self, name: str) -> int:
        """An entry of the folder's settings without which there is no first token."""
        found = self.settings.get(name)
        if found is None:
            raise ValueError(f"{type(self).__name__}: config.json must have {name}; it has not")
        return found

    def _begin(self, input_ids, attention_mask, max_new_tokens, caller):
        most = self.config.max_positions
        if self.config.positions != "relative" and max_new_tokens > most:
            raise ValueError(
                f"{caller}: max_new_tokens must be at most max_positions, {most}; "
                f"got {max_new_tokens}"
            )
        source = unpad(input_ids, attention_mask)
        memory = self._encoded(source.take(input_ids), source.position_ids, source.cu_seqlens)
        B, device = len(input_ids), input_ids.device
        each = torch.arange(B + 1, dtype=torch.int32, device=device)
        cache = Cache(self.config.num_decoder_layers, each, 1, max_new_tokens)
        start = torch.full((B,), self._entry("decoder_start_token_id"), device=device)

        def logits(tokens):
            return self.vocabulary(*self._decoded(tokens, cache.places, each, memory, cache))

        return Begun(start[:, None], start, cache, logits)


def _up_to_last(counts: Tensor) -> Tensor:
    """(B, T): whether a place or one after it counts; a row of none keeps its first."""
    kept = counts.flip(1).cummax(1).values.flip(1)
    return kept | (torch.arange(counts.shape[1], device=counts.device) == 0)


class T5ForConditionalGeneration(Seq2SeqLM):
    """T5, under Hugging Face's name for it."""

    family = T5


class BartForConditionalGeneration(Seq2SeqLM):
    """BART, under Hugging Face's name for it."""

    family = BART
    has_logits_bias = True
