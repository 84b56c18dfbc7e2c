"""Sentence pairs for BERT's pretraining, and batches of them without padding.

Pairs as in Devlin et al. 2019, appendix A.2: [CLS] A [SEP] B [SEP] up to max_length tokens, one in
ten shorter, B half the time what follows A and half the time from another document. Two differences
from the published code. Segments are filled with whole sentences and stop before the limit, instead
of going past it and being cut back; what is cut is a sentence longer than half a sequence, and a
random B where no sentence of its document fits. And the last sentence of a document, left without a
successor, is paired with the one before it, so that the share of true pairs stays one half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimkernels.data.batch import Batch
from slimkernels.data.counter_random import Stream, counter_bits, counter_uniform
from slimkernels.data.masking import Masker
from slimkernels.data.tokenizer import Tokenizer

IS_NEXT, IS_RANDOM = 0, 1

_SHORT_SHARE = 0.1
_SHORTEST = 2

Sentences = list[list[int]]


@dataclass(frozen=True)
class Examples:
    """E sentence pairs, end to end.

    input_ids             (N,) int32, not masked
    starts                (E+1,) int64: example i is [starts[i], starts[i + 1])
    first_lengths         (E,) int64, tokens in [CLS] A [SEP]
    next_sentence_labels  (E,) int64: 0 where B follows A, 1 where it is from another document
    documents             (E, 2) int64: the documents A and B come from
    """

    input_ids: np.ndarray
    starts: np.ndarray
    first_lengths: np.ndarray
    next_sentence_labels: np.ndarray
    documents: np.ndarray

    def __len__(self) -> int:
        return len(self.first_lengths)


def pack_examples(
    encoded_documents: Sequence[Sentences],
    tokenizer: Tokenizer,
    *,
    max_length: int = 128,
    seed: int = 0,
) -> Examples:
    """Cuts documents into sentence pairs, a pure function of its arguments.

    encoded_documents  what Tokenizer.encode_documents returns; documents of no sentence are passed
                       over, and one of a single sentence gives only a random pair
    max_length         tokens in an example at most, special ones among them; at least 8
    Raises             ValueError for fewer than two documents with text (there is no other document
                       to take B from) and for a max_length below 8.
    """
    if max_length < 8:
        raise ValueError(f"pack_examples: max_length must be at least 8; got {max_length}")
    budget = max_length - 3
    cut = [_cut_long(sentences, budget // 2) for sentences in encoded_documents]
    filled = [number for number, sentences in enumerate(cut) if sentences]
    if len(filled) < 2:
        raise ValueError(
            "pack_examples: at least two documents with text are needed, so that B can come from "
            f"another; got {len(filled)}"
        )
    pairs = [
        pair
        for rank in range(len(filled))
        for pair in _document_pairs(cut, filled, rank, budget, seed)
    ]
    return _lay_out(pairs, tokenizer)


class RaggedBatches:
    """Batches of examples by the step: batches[step] depends on (examples, seed, step) only.

    So a run resumes at any step with nothing to replay. Each epoch visits every example exactly
    once, in an order drawn anew, and fills each batch with the next examples in that order until
    one more would pass tokens_per_batch. Masks are drawn anew each epoch too. The first look into
    an epoch plans it (milliseconds for the sample corpus); after that a batch costs what it holds.

    For loading ahead: DataLoader(batches, batch_size=None, sampler=range(start, stop)).
    """

    def __init__(
        self,
        examples: Examples,
        tokenizer: Tokenizer,
        *,
        tokens_per_batch: int = 1024,
        seed: int = 0,
        mask_probability: float = 0.15,
        is_heldout: bool = False,
    ) -> None:
        """Raises ValueError when there is no example or one is longer than tokens_per_batch.

        tokens_per_batch  real tokens in a batch at most
        is_heldout        the same order and the same masks in every epoch; the order is drawn, so
                          that the first few batches are a sample of all documents
        """
        if not len(examples):
            raise ValueError("RaggedBatches: examples must not be empty")
        self._lengths = np.diff(examples.starts)
        if self._lengths.max() > tokens_per_batch:
            raise ValueError(
                "RaggedBatches: tokens_per_batch must be at least the longest example, "
                f"{self._lengths.max()}; got {tokens_per_batch}"
            )
        self.examples = examples
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.is_heldout = is_heldout
        self._masker = Masker(
            tokenizer.vocab_size,
            tokenizer.mask_id,
            tokenizer.special_ids,
            seed=seed,
            probability=mask_probability,
        )
        self._first_steps = [0]  # of each epoch planned so far, and of the one after
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Batches in the first epoch; a later one may have a few more or fewer."""
        return self._first_step(1)

    def __iter__(self) -> Iterator[Batch]:
        """The first epoch, which for held-out text is every epoch."""
        return (self[step] for step in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0 through all epochs without end."""
        epoch, _ = self.epoch_of(step)
        return self._assemble(self.example_numbers(step), epoch)

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step."""
        if step < 0:
            raise IndexError(f"RaggedBatches: step must not be negative; got {step}")
        if self.is_heldout:
            return divmod(step, len(self))
        while self._first_steps[-1] <= step:
            self._first_step(len(self._first_steps))
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return epoch, step - self._first_steps[epoch]

    def example_numbers(self, step: int) -> np.ndarray:
        """(B,) int64: which examples the step's batch holds, in its order."""
        epoch, within = self.epoch_of(step)
        order, ends = self._plan(epoch)
        return order[ends[within] : ends[within + 1]]

    def _first_step(self, epoch: int) -> int:
        while len(self._first_steps) <= epoch:
            _, ends = self._plan(len(self._first_steps) - 1)
            self._first_steps.append(self._first_steps[-1] + len(ends) - 1)
        return self._first_steps[epoch]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order (E,), and where its batches begin and end in it."""
        epoch = 0 if self.is_heldout else epoch
        if self._planned is None or self._planned[0] != epoch:
            bits = counter_bits(self.seed, Stream.ORDER, epoch, np.arange(len(self.examples)))
            order = np.argsort(bits, kind="stable")
            ends = _fill(self._lengths[order], self.tokens_per_batch)
            self._planned = (epoch, order, ends)
        return self._planned[1:]

    def _assemble(self, numbers: np.ndarray, epoch: int) -> Batch:
        lengths = self._lengths[numbers]
        cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
        position_ids = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        source = position_ids + np.repeat(self.examples.starts[numbers], lengths)
        segment_ids = position_ids >= np.repeat(self.examples.first_lengths[numbers], lengths)
        input_ids, masked_positions, masked_labels = self._masker(
            self.examples.input_ids[source].astype(np.int64),
            cu_seqlens,
            numbers,
            epoch=0 if self.is_heldout else epoch,
        )
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            segment_ids=torch.from_numpy(segment_ids.astype(np.int64)),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            masked_positions=torch.from_numpy(masked_positions),
            masked_labels=torch.from_numpy(masked_labels),
            next_sentence_labels=torch.from_numpy(self.examples.next_sentence_labels[numbers]),
            max_length=int(lengths.max()),
        )


def _fill(lengths: np.ndarray, budget: int) -> np.ndarray:
    """Boundaries of the longest runs, in order, whose lengths add up to at most the budget."""
    total = np.concatenate(([0], np.cumsum(lengths)))
    ends = [0]
    while ends[-1] < len(lengths):
        ends.append(int(np.searchsorted(total, total[ends[-1]] + budget, side="right")) - 1)
    return np.asarray(ends)


def _cut_long(sentences: Sentences, limit: int) -> Sentences:
    """The sentences, those over the limit in pieces of it, so that any two fit one example."""
    return [
        sentence[start : start + limit]
        for sentence in sentences
        for start in range(0, len(sentence), limit)
    ]


def _document_pairs(cut: list[Sentences], filled: list[int], rank: int, budget: int, seed: int):
    """Yields (A ids, B ids, label, A's document, B's document) for one document."""
    number = filled[rank]
    sentences = cut[number]
    # Every pair uses at least one sentence, so this many rows of draws are enough.
    draws = counter_uniform(
        seed, Stream.PAIRS, number, np.arange(len(sentences))[:, None], np.arange(6)
    ).tolist()
    start, pair = 0, 0
    while start < len(sentences):
        is_short, shortness, split, coin, other, place = draws[pair]
        target = budget
        if is_short < _SHORT_SHARE:
            target = _SHORTEST + int(shortness * (budget - _SHORTEST))
        is_random = coin >= 0.5 or len(sentences) == 1
        if start == len(sentences) - 1 and start > 0 and not is_random:
            start -= 1
        chunk = sentences[start : _chunk_end(sentences, start, target)]
        a_count = 1 + int(split * (len(chunk) - 1)) if len(chunk) > 1 else 1
        a, b = sum(chunk[:a_count], []), sum(chunk[a_count:], [])
        if is_random:
            other = int(other * (len(filled) - 1))
            b_number = filled[other + (other >= rank)]
            # As long as the true B could have been, or length alone would give the label away.
            room = max(target - len(a), len(b)) if b else budget - len(a)
            b = _random_segment(cut[b_number], place, room)
            # What B would have been is left for the next pair.
            start += a_count
        else:
            b_number = number
            start += len(chunk)
        yield a, b, IS_RANDOM if is_random else IS_NEXT, number, b_number
        pair += 1


def _chunk_end(sentences: Sentences, start: int, target: int) -> int:
    """The end of the run that fits the target; two sentences, if there are two, even where not."""
    end = min(start + 2, len(sentences))
    total = sum(len(sentence) for sentence in sentences[start:end])
    while end < len(sentences) and total + len(sentences[end]) <= target:
        total += len(sentences[end])
        end += 1
    return end


def _random_segment(sentences: Sentences, place: float, room: int) -> list[int]:
    """Whole sentences that fit the room, from a random one on, or else the start of that one."""
    first = int(place * len(sentences))
    for step in range(len(sentences)):
        start = (first + step) % len(sentences)
        if len(sentences[start]) <= room:
            break
    else:
        return sentences[first][:room]
    segment: list[int] = []
    for sentence in sentences[start:]:
        if len(segment) + len(sentence) > room:
            break
        segment.extend(sentence)
    return segment


def _lay_out(pairs: list, tokenizer: Tokenizer) -> Examples:
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    sequences = [np.array(cls + a + sep + b + sep, dtype=np.int32) for a, b, *_ in pairs]
    lengths = [len(sequence) for sequence in sequences]
    return Examples(
        input_ids=np.concatenate(sequences),
        starts=np.concatenate(([0], np.cumsum(lengths))),
        first_lengths=np.array([len(a) + 2 for a, *_ in pairs], dtype=np.int64),
        next_sentence_labels=np.array([pair[2] for pair in pairs], dtype=np.int64),
        documents=np.array([pair[3:] for pair in pairs], dtype=np.int64),
    )
