"""What models return, under Hugging Face's names. Take fields by name: a missing one is None."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitsOutput(NamedTuple):
    """Of a head with one kind of scores.

    loss    scalar in float32 at least, where there are labels
    logits  scores; 0 where there is padding
    """

    loss: Tensor | None
    logits: Tensor | None


class Seq2SeqOutput(NamedTuple):
    """LogitsOutput's fields, and encoder_last_hidden_state (B, S, C), or (N, C) if ragged."""

    loss: Tensor | None
    logits: Tensor | None
    encoder_last_hidden_state: Tensor


class PoolingOutput(NamedTuple):
    """last_hidden_state (B, T, C), 0 where there is padding; pooler_output (B, C)."""

    last_hidden_state: Tensor
    pooler_output: Tensor


class QuestionAnsweringOutput(NamedTuple):
    """Scores (B, T) of being an answer's first and last token; -inf where there is padding."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor
