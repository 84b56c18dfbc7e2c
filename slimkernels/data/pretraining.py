"""From a corpus to what a pretraining run consumes: tokenizer, training and held-out batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slimkernels.data.packing import RaggedBatches, pack_examples
from slimkernels.data.text import read_documents, split_documents
from slimkernels.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class PretrainingData:
    """training goes on without end by the step; heldout has fixed masks and a fixed order."""

    tokenizer: Tokenizer
    training: RaggedBatches
    heldout: RaggedBatches


def prepare(
    corpus: Path,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    max_length: int,
    tokens_per_batch: int,
    seed: int,
    say: Callable[[str], None],
) -> PretrainingData:
    """Read, split, tokenize and pack a corpus: a pure function of its arguments and the text.

    corpus     a file or folder that read_documents takes
    tokenizer  a resumed run's own, which keeps its vocabulary; None learns one from the corpus
    say        told what is about to be done, since it takes some seconds
    Errors     ValueError in one sentence for a corpus that cannot be read or is too small
    """
    say(f"Reading {corpus} ...")
    documents, heldout_documents = split_documents(read_documents(corpus))
    if tokenizer is None:
        say(f"Training a tokenizer on {len(documents)} documents ...")
        tokenizer = Tokenizer.train(documents, vocab_size)

    def batches(texts: list[str], is_heldout: bool) -> RaggedBatches:
        encoded = tokenizer.encode_documents(texts)
        return RaggedBatches(
            pack_examples(encoded, tokenizer, max_length=max_length, seed=seed),
            tokenizer,
            tokens_per_batch=tokens_per_batch,
            seed=seed,
            is_heldout=is_heldout,
        )

    data = PretrainingData(tokenizer, batches(documents, False), batches(heldout_documents, True))
    say(
        f"{len(data.training.examples)} sentence pairs in {len(data.training)} batches an epoch; "
        f"{len(heldout_documents)} documents held out."
    )
    return data
