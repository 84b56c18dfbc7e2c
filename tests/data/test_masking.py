"""Masks: BERT's rates, ordinary tokens only, the same for an example wherever it stands."""

import numpy as np
import pytest

from slimkernels.data import Masker, RaggedBatches
from slimkernels.data.counter_random import Stream, counter_bits, counter_uniform

MASK_ID, SPECIAL = 4, (0, 1, 2, 3, 4)
VOCAB = 69
P = 0.15


@pytest.fixture(scope="module")
def masked():
    """(input_ids, masked, positions, labels) of 2000 examples of 202 tokens, [CLS] ... [SEP]."""
    ids = np.random.default_rng(1).integers(5, VOCAB, (2000, 202))
    ids[:, 0], ids[:, -1] = 2, 3
    ids = ids.reshape(-1)
    cu_seqlens = np.arange(0, len(ids) + 1, 202)
    return ids, *Masker(VOCAB, MASK_ID, SPECIAL)(ids, cu_seqlens, np.arange(2000), epoch=0)


def test_share_of_chosen_tokens(masked, assert_binomial):
    # An example with none chosen (probability 0.85^200, 8e-15) would add one: nothing here.
    _, _, positions, _ = masked
    assert_binomial(len(positions), 2000 * 200, P)


def test_share_of_masked_random_and_kept(masked, assert_binomial):
    _, after, positions, labels = masked
    # One random token in VOCAB - 5 is the one that stood there.
    same_by_chance = 0.1 / (VOCAB - 5)
    put, n = after[positions], len(positions)
    assert_binomial((put == MASK_ID).sum(), n, 0.8)
    assert_binomial((put == labels).sum(), n, 0.1 + same_by_chance)
    assert_binomial(((put != labels) & (put != MASK_ID)).sum(), n, 0.1 - same_by_chance)


def test_random_tokens_are_uniform_over_ordinary_ones(masked, assert_binomial):
    _, after, positions, labels = masked
    replaced = after[positions][(after[positions] != MASK_ID) & (after[positions] != labels)]
    counts = np.bincount(replaced, minlength=VOCAB)
    assert not counts[:5].any()
    for count in counts[5:]:
        assert_binomial(count, len(replaced), 1 / (VOCAB - 5))


def test_only_chosen_ordinary_tokens_change(masked):
    ids, after, positions, labels = masked
    assert (np.diff(positions) > 0).all()
    assert (ids[positions] == labels).all()
    assert not np.isin(labels, SPECIAL).any()
    untouched = np.ones(len(ids), dtype=bool)
    untouched[positions] = False
    assert (ids[untouched] == after[untouched]).all()


def test_neighbours_examples_and_epochs_are_independent(masked, assert_binomial):
    ids, _, positions, _ = masked
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[positions] = True
    chosen = chosen.reshape(2000, 202)[:, 1:-1]
    again = np.zeros(len(ids), dtype=bool)
    masker = Masker(VOCAB, MASK_ID, SPECIAL)
    again[masker(ids, np.arange(0, len(ids) + 1, 202), np.arange(2000), epoch=1)[1]] = True
    again = again.reshape(2000, 202)[:, 1:-1]
    # Every second pair, so that no trial shares a token with another.
    assert_binomial((chosen[:, ::2] & chosen[:, 1::2]).sum(), 2000 * 100, P * P)
    assert_binomial((chosen[::2] & chosen[1::2]).sum(), 1000 * 200, P * P)
    assert_binomial((chosen & again).sum(), 2000 * 200, P * P)


def test_seed_changes_the_masks(masked):
    ids, _, positions, _ = masked
    cu_seqlens = np.arange(0, len(ids) + 1, 202)
    other = Masker(VOCAB, MASK_ID, SPECIAL, seed=1)(ids, cu_seqlens, np.arange(2000), epoch=0)[1]
    assert len(np.setdiff1d(positions, other)) > len(positions) / 2


def test_each_example_with_an_ordinary_token_has_a_label():
    ids = np.array([2, 9, 3] * 500 + [2, 3, 3])
    cu_seqlens = np.arange(0, len(ids) + 1, 3)
    _, positions, labels = Masker(VOCAB, MASK_ID, SPECIAL)(ids, cu_seqlens, np.arange(501), epoch=0)
    assert positions.tolist() == list(range(1, 1500, 3))
    assert (labels == 9).all()


def test_special_ids_anywhere_in_the_vocabulary():
    ids = np.tile(np.arange(VOCAB), 300)
    special = (7, 20, 33, 46, 68)
    after, positions, labels = Masker(VOCAB, 46, special, probability=0.9)(
        ids, np.array([0, len(ids)]), np.array([0]), epoch=3
    )
    assert not np.isin(labels, special).any()
    assert not np.isin(after[positions], (7, 20, 33, 68)).any()


def _by_example(batches, steps):
    found = {}
    for step in steps:
        batch, numbers = batches[step], batches.example_numbers(step)
        ends = batch.cu_seqlens.tolist()
        labels = dict(
            zip(batch.masked_positions.tolist(), batch.masked_labels.tolist(), strict=True)
        )
        for row, number in enumerate(numbers.tolist()):
            span = range(ends[row], ends[row + 1])
            found[number] = (
                batch.input_ids[ends[row] : ends[row + 1]].tolist(),
                [(token - ends[row], labels[token]) for token in span if token in labels],
            )
    return found


def test_masks_do_not_depend_on_the_batch(examples, tokenizer):
    wide = RaggedBatches(examples, tokenizer, tokens_per_batch=1024, seed=5)
    narrow = RaggedBatches(examples, tokenizer, tokens_per_batch=200, seed=5)
    heldout = RaggedBatches(examples, tokenizer, tokens_per_batch=777, seed=5, is_heldout=True)
    wide, narrow, heldout = (
        _by_example(each, range(len(each))) for each in (wide, narrow, heldout)
    )
    assert len(wide) == len(examples)
    assert wide == narrow == heldout


def test_counter_random_is_splitmix64():
    # The first outputs of the published generator for seed 1234567; its state steps by a constant.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seed_zero_step = counter_bits(1234567, Stream.PAIRS)
    assert seed_zero_step.tolist() == expected[:1]
    assert counter_bits(1234567, Stream.ORDER).tolist() == expected[1:2]
    assert counter_bits(1234567, Stream.MASKS).tolist() == expected[2:]


def test_counter_random_takes_any_seed_and_broadcasts():
    table = counter_bits(-1, Stream.MASKS, np.arange(3)[:, None], np.arange(4))
    assert table.shape == (3, 4)
    assert len(np.unique(table)) == 12
    assert table[2, 3] == counter_bits(2**64 - 1, Stream.MASKS, 2, 3)[0]
    uniform = counter_uniform(0, Stream.PAIRS, np.arange(100_000))
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0
    # The mean of n uniforms has standard deviation 1 / sqrt(12 n); five of them.
    assert abs(uniform.mean() - 0.5) < 5 / np.sqrt(12 * 100_000)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((10, 4, SPECIAL, 0.0), r"probability must be in \(0, 1\); got 0.0"),
        ((10, 10, SPECIAL, 0.15), "must be below vocab_size 10; got 10"),
        ((5, 4, SPECIAL, 0.15), "leave no ordinary token"),
    ],
)
def test_masker_refuses(arguments, sentence):
    *positional, probability = arguments
    with pytest.raises(ValueError, match=sentence):
        Masker(*positional, probability=probability)
