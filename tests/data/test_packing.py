"""Sentence pairs, and batches that are a pure function of (seed, step)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from slimkernels.data import Batch, RaggedBatches, pack_examples

CLS, SEP = 2, 3
NAMES = SimpleNamespace(cls_id=CLS, sep_id=SEP)
STRIDE = 10**5  # token = document * STRIDE + place in it + 10: every token says where it stood
MAX_LENGTH = 64


def numbered_documents(count, sentences, longest, seed=0):
    """Documents of sentences of numbered tokens, and the places where sentences begin."""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, (count, sentences))
    documents, boundaries = [], set()
    for number, row in enumerate(lengths):
        ends = number * STRIDE + 10 + np.concatenate(([0], np.cumsum(row)))
        boundaries.update(ends.tolist())
        documents.append([list(range(a, b)) for a, b in zip(ends[:-1], ends[1:], strict=True)])
    return documents, boundaries


def segments(examples):
    """Yields (A, B, label, documents) with the special tokens checked and taken off."""
    for number in range(len(examples)):
        ids = examples.input_ids[examples.starts[number] : examples.starts[number + 1]].tolist()
        first = int(examples.first_lengths[number])
        a, b = ids[1 : first - 1], ids[first:-1]
        assert (ids[0], ids[first - 1], ids[-1]) == (CLS, SEP, SEP)
        assert a and b and min(*a, *b) >= 10
        yield a, b, int(examples.next_sentence_labels[number]), tuple(examples.documents[number])


def segments_of(documents, **options):
    return segments(pack_examples(documents, NAMES, **options))


@pytest.fixture(scope="module")
def numbered():
    documents, boundaries = numbered_documents(40, 150, 30)
    return documents, boundaries, pack_examples(documents, NAMES, max_length=MAX_LENGTH, seed=1)


def test_segments_are_runs_of_whole_sentences(numbered):
    _, boundaries, examples = numbered
    cut_back = 0
    for a, b, _, places in segments(examples):
        for segment, document in zip((a, b), places, strict=True):
            assert segment == list(range(segment[0], segment[-1] + 1))
            assert segment[0] // STRIDE == document
            assert segment[0] in boundaries
        assert a[-1] + 1 in boundaries
        cut_back += b[-1] + 1 not in boundaries
    # Only a random B may be cut, where no sentence of its document fits the room.
    assert cut_back < len(examples) / 100
    assert np.diff(examples.starts).max() <= MAX_LENGTH


def test_true_pairs_follow_and_random_ones_come_from_another_document(numbered):
    _, _, examples = numbered
    for a, b, label, (document_a, document_b) in segments(examples):
        if label == 0:
            assert b[0] == a[-1] + 1
            assert document_a == document_b
        else:
            assert document_a != document_b


def test_half_the_pairs_are_random_and_from_every_document(numbered, assert_binomial):
    _, _, examples = numbered
    is_random = examples.next_sentence_labels == 1
    assert_binomial(is_random.sum(), len(examples), 0.5)
    for document in range(40):
        from_others = is_random & (examples.documents[:, 0] != document)
        count = (examples.documents[from_others, 1] == document).sum()
        assert_binomial(count, from_others.sum(), 1 / 39)


def test_every_token_is_used(numbered):
    documents, _, examples = numbered
    own = set()
    for a, b, label, _ in segments(examples):
        own.update(a if label else a + b)
    assert own == {token for document in documents for sentence in document for token in sentence}


def test_length_does_not_give_the_label_away(numbered):
    _, _, examples = numbered
    second = np.diff(examples.starts) - examples.first_lengths
    true, random = (second[examples.next_sentence_labels == label] for label in (0, 1))
    error = np.sqrt(true.var() / len(true) + random.var() / len(random))
    assert abs(true.mean() - random.mean()) < 5 * error


def test_half_the_pairs_are_random_in_short_documents_too(assert_binomial):
    # Of three sentences the last is often left alone, where the published code takes a random B.
    documents, _ = numbered_documents(10_000, 3, 8)
    examples = pack_examples(documents, NAMES, max_length=32)
    assert_binomial((examples.next_sentence_labels == 1).sum(), len(examples), 0.5)


def test_equal_sentences_are_never_cut():
    tokens = [[list(range(place, place + 10)) for place in range(10, 3000, 10)]] * 3
    for a, b, _, _ in segments_of(tokens, max_length=MAX_LENGTH):
        assert len(a) % 10 == len(b) % 10 == 0


def test_one_sequence_in_ten_is_short(assert_binomial):
    # Sentences of one token fill a sequence to its target exactly, short of the document's end.
    documents, _ = numbered_documents(2, 40_000, 1)
    far_from_end = [
        len(a) + len(b)
        for a, b, label, _ in segments_of(documents, max_length=8)
        if label == 0 and a[0] % STRIDE < 39_000
    ]
    counts = np.bincount(far_from_end, minlength=6)
    assert_binomial(counts[2:5].sum(), len(far_from_end), 0.1)
    assert counts[5] == len(far_from_end) - counts[2:5].sum()
    for target in (2, 3, 4):
        assert_binomial(counts[target], counts[2:5].sum(), 1 / 3)


def test_a_long_sentence_is_cut_and_kept_whole():
    documents = [[list(range(10, 500))], [list(range(STRIDE + 10, STRIDE + 400))]]
    examples = pack_examples(documents, NAMES, max_length=32)
    own = set()
    for a, b, label, _ in segments(examples):
        own.update(a if label else a + b)
    assert own == {*documents[0][0], *documents[1][0]}


def test_documents_of_one_sentence_give_random_pairs():
    examples = pack_examples([[[10, 11]], [], [[20]], [[30, 31]]], NAMES, max_length=8)
    assert examples.next_sentence_labels.tolist() == [1, 1, 1]
    assert examples.documents[:, 0].tolist() == [0, 2, 3]
    assert 1 not in examples.documents


def test_packing_is_a_function_of_its_arguments(numbered):
    documents, _, examples = numbered
    again = pack_examples(documents, NAMES, max_length=MAX_LENGTH, seed=1)
    other = pack_examples(documents, NAMES, max_length=MAX_LENGTH, seed=2)
    assert np.array_equal(again.input_ids, examples.input_ids)
    assert not np.array_equal(other.input_ids, examples.input_ids)


def test_packing_refuses():
    with pytest.raises(ValueError, match="at least two documents with text are needed.*got 1"):
        pack_examples([[[10]], []], NAMES)
    with pytest.raises(ValueError, match="max_length must be at least 8; got 7"):
        pack_examples([[[10]], [[11]]], NAMES, max_length=7)


def assert_same(left, right):
    assert left.max_length == right.max_length
    for name in Batch.__dataclass_fields__:
        if name != "max_length":
            assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_each_epoch_holds_every_example_once_in_another_order(examples, tokenizer):
    batches = RaggedBatches(examples, tokenizer, seed=3)
    orders, step = [], 0
    for epoch in range(3):
        order = []
        while batches.epoch_of(step)[0] == epoch:
            assert batches.epoch_of(step)[1] == len(order)
            order.append(batches.example_numbers(step))
            step += 1
        orders.append(np.concatenate(order))
        assert np.array_equal(np.sort(orders[-1]), np.arange(len(examples)))
        assert epoch or len(batches) == step
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_batches_are_filled_to_the_budget(examples, tokenizer):
    batches = RaggedBatches(examples, tokenizer, tokens_per_batch=700)
    lengths = np.diff(examples.starts)
    for step in range(len(batches)):
        tokens = batches[step].num_tokens
        assert tokens == lengths[batches.example_numbers(step)].sum() <= 700
        if step + 1 < len(batches):
            assert tokens + lengths[batches.example_numbers(step + 1)[0]] > 700


def test_a_batch_depends_on_seed_and_step_only(examples, tokenizer):
    in_order = RaggedBatches(examples, tokenizer, seed=3)
    count = 2 * len(in_order) + 5
    expected = [in_order[step] for step in range(count)]
    jumping = RaggedBatches(examples, tokenizer, seed=3)
    for step in np.random.default_rng(0).permutation(count)[:40].tolist():
        assert_same(jumping[step], expected[step])
    other = RaggedBatches(examples, tokenizer, seed=4)
    assert not torch.equal(other[0].input_ids, expected[0].input_ids)


@pytest.mark.parametrize("offset", [-2, 3])
def test_resumed_run_goes_on_where_it_stopped(examples, tokenizer, offset):
    whole = RaggedBatches(examples, tokenizer, seed=3)
    stop = len(whole) + offset
    resumed = RaggedBatches(examples, tokenizer, seed=3)
    for step in range(stop, stop + 6):
        assert_same(resumed[step], whole[step])


def test_loader_with_workers_gives_the_same_batches(examples, tokenizer):
    batches = RaggedBatches(examples, tokenizer, seed=3)
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(7, 12), num_workers=1
    )
    for step, loaded in zip(range(7, 12), loader, strict=True):
        assert_same(loaded, batches[step])


def test_heldout_batches_are_the_same_in_every_epoch(examples, tokenizer):
    heldout = RaggedBatches(examples, tokenizer, is_heldout=True)
    once = list(heldout)
    assert len(once) == len(heldout)
    for step in (0, len(heldout) - 1):
        assert_same(heldout[step + 2 * len(heldout)], once[step])
    order = np.concatenate([heldout.example_numbers(step) for step in range(len(heldout))])
    assert np.array_equal(np.sort(order), np.arange(len(examples)))
    # A prefix stands for the whole: the first batches come from many documents.
    first = np.concatenate([heldout.example_numbers(step) for step in range(4)])
    assert len(np.unique(examples.documents[first, 0])) > len(first) / 2


def test_training_masks_change_with_the_epoch(examples, tokenizer):
    batches = RaggedBatches(examples, tokenizer, tokens_per_batch=int(examples.starts[-1]))
    assert len(batches) == 1
    unmasked = []
    for epoch in range(2):
        batch, numbers = batches[epoch], batches.example_numbers(epoch)
        firsts = dict(zip(numbers.tolist(), batch.cu_seqlens.tolist()[:-1], strict=True))
        chosen = set(batch.masked_positions.tolist())
        unmasked.append({number for number, start in firsts.items() if start + 1 in chosen})
    assert unmasked[0] != unmasked[1]


def test_batch_fields(examples, tokenizer):
    batches = RaggedBatches(examples, tokenizer)
    batch, numbers = batches[2], batches.example_numbers(2)
    ids = batch.input_ids.clone()
    ids[batch.masked_positions] = batch.masked_labels
    ends = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.num_sequences, batch.num_tokens) == (len(numbers), ends[-1])
    for row, number in enumerate(numbers.tolist()):
        expected = examples.input_ids[examples.starts[number] : examples.starts[number + 1]]
        first, length = int(examples.first_lengths[number]), len(expected)
        sequence = slice(ends[row], ends[row + 1])
        assert ids[sequence].tolist() == expected.tolist()
        assert batch.segment_ids[sequence].tolist() == [0] * first + [1] * (length - first)
        assert batch.position_ids[sequence].tolist() == list(range(length))
        assert batch.next_sentence_labels[row] == examples.next_sentence_labels[number]
    assert not np.isin(batch.masked_labels, tokenizer.special_ids).any()
    for name in Batch.__dataclass_fields__:
        if name not in ("cu_seqlens", "max_length"):
            assert getattr(batch, name).dtype == torch.int64, name


def test_padded_round_trip(examples, tokenizer):
    batch = RaggedBatches(examples, tokenizer)[0]
    for length in (batch.max_length, 150):
        padded = batch.padded(None if length == batch.max_length else length)
        real = padded["attention_mask"].bool()
        assert padded["input_ids"].shape == (batch.num_sequences, length)
        assert torch.equal(padded["input_ids"][real], batch.input_ids)
        assert torch.equal(padded["token_type_ids"][real], batch.segment_ids)
        assert torch.equal(padded["position_ids"][real], batch.position_ids)
        assert torch.equal(real.sum(1).int(), batch.cu_seqlens.diff())
        assert not padded["input_ids"][~real].any()
        labels = padded["labels"][real]
        assert torch.equal((labels != -100).nonzero()[:, 0], batch.masked_positions)
        assert torch.equal(labels[batch.masked_positions], batch.masked_labels)
        assert (padded["labels"][~real] == -100).all()
        assert padded["next_sentence_label"] is batch.next_sentence_labels
    padding = 1 - batch.padded()["attention_mask"].double().mean()
    assert batch.padding_saved == pytest.approx(padding.item())
    with pytest.raises(
        ValueError, match=f"at least the longest sequence, {batch.max_length}; got 3"
    ):
        batch.padded(3)


def test_batch_moves_and_works_out_its_longest(examples, tokenizer):
    batch = RaggedBatches(examples, tokenizer)[0]
    assert_same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert moved.max_length == batch.max_length
    assert all(
        getattr(moved, name).device.type == "meta"
        for name in Batch.__dataclass_fields__
        if name != "max_length"
    )
    tensors = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
    assert_same(Batch(**{**tensors, "max_length": -1}), batch)


def test_batches_refuse(examples, tokenizer):
    with pytest.raises(ValueError, match="tokens_per_batch must be at least the longest example"):
        RaggedBatches(examples, tokenizer, tokens_per_batch=20)
    with pytest.raises(IndexError, match="step must not be negative; got -1"):
        RaggedBatches(examples, tokenizer)[-1]
