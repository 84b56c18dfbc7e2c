"""Decoders: GPT-2 (Radford et al. 2019) and Llama (Touvron et al. 2023), from the one block.

They differ in their config alone. A padded batch is computed without its padding, a ragged one as
it comes, and generation goes on from a ragged prompt with a cache of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.models.bert import positions
from slimkernels.models.block import initialise
from slimkernels.models.cache import Cache
from slimkernels.models.checks import check_batch, check_ids, check_labels, check_padded, spread
from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert_gpt import GPT2, LLAMA
from slimkernels.models.generate import Begun, Generates
from slimkernels.models.outputs import LogitsOutput
from slimkernels.models.padding import unpad
from slimkernels.models.pretrained import Pretrained
from slimkernels.models.stack import Stack
from slimkernels.models.vocabulary import Vocabulary


class CausalLM(Generates, Pretrained):
    """A decoder with scores of every token for the place after each token."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Stack(config, config.num_layers, is_causal=True)
        self.vocabulary = Vocabulary(config)
        initialise(self, config.initializer_std)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        skip_logits: bool = False,
    ) -> LogitsOutput:
        """Logits of a ragged batch, or of a padded one, and with labels the loss.

        input_ids       (T,) int64 with cu_seqlens, or (B, T)
        attention_mask  (B, T): 0 where there is padding, wherever it stands
        position_ids    like input_ids; counted from 0 in each sequence, or each token's column
        labels          like input_ids, and not shifted: that of token i is what token i - 1 is to
                        predict; -100 for none. One on padding is not counted, nor that of
                        the first token after padding, which Hugging Face predicts from there
        cu_seqlens      (B+1,) int32: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
        skip_logits     with labels: logits are None, and are never stored
        Returns         logits (T, V) or (B, T, V), 0 on padding; the loss is a mean over labels
        Errors          ValueError for a wrong shape, an empty row or, on the CPU, an id or a
                        position out of range
        Caution         waits for the device if there is a mask. Without one torch.compile gets one
                        graph
        """
        name = type(self).__name__
        if labels is not None:
            check_labels(
                "labels", labels, self.config.vocab_size, tuple(input_ids.shape), model=name
            )
        elif skip_logits:
            raise ValueError(f"{name}: labels must be given with skip_logits; got None")
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError(f"{name}: attention_mask must be None with cu_seqlens")
        if attention_mask is None:
            logits, loss = self._unmasked(input_ids, position_ids, labels, cu_seqlens, skip_logits)
            return LogitsOutput(loss, logits)
        check_padded(input_ids, attention_mask, model=name)
        ragged = unpad(input_ids, attention_mask)
        places = ragged.position_ids
        if position_ids is not None:
            shape = tuple(input_ids.shape)
            places = ragged.take(spread("position_ids", position_ids, shape, name))
        logits, loss = self._unmasked(
            *(ragged.take(input_ids), places, ragged.take(labels)), ragged.cu_seqlens, skip_logits
        )
        return LogitsOutput(loss, None if logits is None else ragged.put_back(logits))

    def _unmasked(self, input_ids, position_ids, labels, cu_seqlens, skip_logits):
        hidden, table = self._hidden(input_ids, position_ids, cu_seqlens)
        if labels is None:
            return self.vocabulary(hidden, table), None
        targets = _next(labels, cu_seqlens)
        return self.vocabulary.loss(hidden, table, targets, skip_logits=skip_logits)

    def _hidden(self, input_ids, position_ids, cu_seqlens, cache=None):
        name, config = type(self).__name__, self.config
        check_batch(config, input_ids, cu_seqlens, model=name)
        if position_ids is None:
            position_ids = positions(input_ids, cu_seqlens)
        shape = tuple(input_ids.shape)
        check_ids("position_ids", position_ids, config.max_positions, shape, model=name)
        return self.decoder(input_ids, position_ids, cu_seqlens=cu_seqlens, cache=cache)

    def _begin(self, input_ids, attention_mask, max_new_tokens, caller):
        ragged, most = unpad(input_ids, attention_mask), self.config.max_positions
        T = input_ids.shape[1]
        if T + max_new_tokens - 1 > most:
            raise ValueError(
                f"{caller}: {T} tokens and max_new_tokens must fit in max_positions, "
                f"{most}; got {max_new_tokens}"
            )
        cache = Cache(self.config.num_layers, ragged.cu_seqlens, T, max_new_tokens)

        def logits(tokens):
            ends = cache.cu_seqlens
            hidden, table = self._hidden(tokens, cache.places, ends, cache)
            return self.vocabulary(hidden.index_select(0, ends[1:] - 1), table)

        return Begun(input_ids, ragged.take(input_ids), cache, logits)


def _next(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """For each token the label of the one after it in its sequence, -100 for the last."""
    labels = labels.roll(-1, -1)
    if cu_seqlens is None:
        last = torch.arange(labels.shape[-1], device=labels.device) == labels.shape[-1] - 1
        return labels.masked_fill(last, -100)
    return labels.index_fill(0, (cu_seqlens[1:] - 1).long(), -100)


class GPT2LMHeadModel(CausalLM):
    """GPT-2, under Hugging Face's name for it."""

    family = GPT2


class LlamaForCausalLM(CausalLM):
    """Llama and what has its form, under Hugging Face's name for it."""

    family = LLAMA
