"""One small corpus for all tests of data: part of the sample, tokenized once."""

import math

import pytest

from slimkernels.data import (
    Tokenizer,
    pack_examples,
    read_documents,
    sample_path,
    split_documents,
)


@pytest.fixture(scope="session")
def sample_documents():
    return read_documents(sample_path())


@pytest.fixture(scope="session")
def train_documents(sample_documents):
    return split_documents(sample_documents)[0][::12]


@pytest.fixture(scope="session")
def tokenizer(train_documents):
    return Tokenizer.train(train_documents, vocab_size=2048)


@pytest.fixture(scope="session")
def examples(tokenizer, train_documents):
    return pack_examples(tokenizer.encode_documents(train_documents), tokenizer)


@pytest.fixture(scope="session")
def assert_binomial():
    """Fails when a count is five standard deviations off.

    A count of n independent trials of probability p has mean n p and standard deviation
    sqrt(n p (1 - p)); for the n used here a right generator is that far off for 6 seeds in ten
    million, and the seeds are fixed.
    """

    def check(count, n, p):
        bound = 5 * math.sqrt(n * p * (1 - p))
        assert abs(count - n * p) <= bound, f"{count} of {n}: expected {n * p:.1f} +- {bound:.1f}"

    return check
