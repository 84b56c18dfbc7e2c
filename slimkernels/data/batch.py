"""The batch that pretraining eats: sequences laid end to end, no padding."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """B sequences of T tokens in all.

    input_ids             (T,) int64, already masked
    segment_ids           (T,) int64: 0 in [CLS] A [SEP], 1 in B [SEP]
    position_ids          (T,) int64, from 0 in each sequence
    cu_seqlens            (B+1,) int32: sequence i is [cu_seqlens[i], cu_seqlens[i + 1])
    masked_positions      (K,) int64, indices into T, ascending
    masked_labels         (K,) int64, the ids that stood there
    next_sentence_labels  (B,) int64: 0 where B follows A, 1 where it is from another document
    max_length            the longest sequence; worked out from cu_seqlens where not given, and kept
                          as an int so that nobody has to ask the device
    """

    input_ids: torch.Tensor
    segment_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    next_sentence_labels: torch.Tensor
    max_length: int = -1

    def __post_init__(self) -> None:
        if self.max_length < 0:
            lengths = self.cu_seqlens.diff()
            longest = int(lengths.max()) if len(lengths) else 0
            object.__setattr__(self, "max_length", longest)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def padding_saved(self) -> float:
        """The share of this batch, were it padded to (B, max_length), that would be padding."""
        padded = self.num_sequences * self.max_length
        return 1.0 - self.num_tokens / padded if padded else 0.0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch with every tensor on the device."""
        tensors = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in fields(self)
            if field.name != "max_length"
        }
        return replace(self, **tensors)

    def padded(self, length: int | None = None, *, pad_id: int = 0) -> dict[str, torch.Tensor]:
        """The same batch as rectangles, under the names of Hugging Face's BertForPreTraining.

        length   columns of the rectangles, L; by default max_length
        Returns  input_ids, token_type_ids, attention_mask, position_ids and labels (-100 where
                 there is nothing to predict), each (B, L) int64; next_sentence_label (B,) int64
        Raises   ValueError where a sequence is longer than length.
        """
        length = self.max_length if length is None else length
        if length < self.max_length:
            raise ValueError(
                f"Batch.padded: length must be at least the longest sequence, {self.max_length}; "
                f"got {length}"
            )
        lengths = self.cu_seqlens.diff()
        rows = torch.arange(self.num_sequences, device=lengths.device)
        # output_size, because without it the device is asked for the sum of the lengths.
        rows = rows.repeat_interleave(lengths, output_size=self.num_tokens)
        places = rows * length + self.position_ids

        def rectangle(where: torch.Tensor, content: torch.Tensor, fill: int) -> torch.Tensor:
            filled = content.new_full((self.num_sequences * length,), fill)
            filled[where] = content
            return filled.view(self.num_sequences, length)

        return {
            "input_ids": rectangle(places, self.input_ids, pad_id),
            "token_type_ids": rectangle(places, self.segment_ids, 0),
            "attention_mask": rectangle(places, torch.ones_like(self.input_ids), 0),
            "position_ids": rectangle(places, self.position_ids, 0),
            "labels": rectangle(places[self.masked_positions], self.masked_labels, -100),
            "next_sentence_label": self.next_sentence_labels,
        }
