"""T5 and BART against transformers: logits, losses, gradients, and what they generate."""

from dataclasses import replace

import pytest
import torch
from module_cases import assert_model_no_worse
from pretrained_cases import assert_written_as_read, randomised, results

from slimkernels import models
from slimkernels.models.seq2seq import _up_to_last

transformers = pytest.importorskip("transformers")

SPECIAL = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 61}
T5 = {
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "dropout_rate": 0.0,
}
BART = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 24,
    "dropout": 0.0,
    "bos_token_id": 3,
}
# The family, the config, and the spread of parameters at which the text depends on the source.
CASES = {
    "t5": ("T5", T5, 0.4),
    "t5, gated and untied": (
        "T5",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        0.4,
    ),
    "bart": ("Bart", BART, 0.7),
    "bart, scaled": ("Bart", BART | {"scale_embedding": True, "activation_function": "relu"}, 0.3),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Ours and theirs from one folder, and the folder."""
    family, sizes, std = CASES[request.param]
    name = f"{family}ForConditionalGeneration"
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(
        getattr(transformers, f"{family}Config")(**SPECIAL, **sizes)
    )
    if "untied" in request.param:  # version 5 ties whatever the config says, but for such a file
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty_like(theirs.lm_head.weight))
    path = tmp_path_factory.mktemp("seq2seq")
    randomised(theirs, std).save_pretrained(path)
    theirs = type(theirs).from_pretrained(path)
    return getattr(models, name).from_pretrained(path), theirs, path


@pytest.fixture
def batch():
    """Three sources and targets, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (3, 10), generator=generator)
    mask = (torch.arange(10) < torch.tensor([[5], [10], [7]])).long()
    labels = torch.randint(3, 61, (3, 8), generator=generator)
    labels[torch.arange(8) >= torch.tensor([[8], [3], [6]])] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def in_float64(theirs, path):
    return type(theirs).from_pretrained(path, dtype=torch.float64)


def fields_of(model, batch):
    y = model(**batch)
    source, target = batch["attention_mask"].bool(), batch["labels"] != -100
    return {
        "loss": y.loss,
        "logits": y.logits[target],
        "encoder": y.encoder_last_hidden_state[source],
    }


def outputs(model, batch):
    return results(model, fields_of(model, batch))


def test_logits_loss_and_gradients_are_hugging_faces(pair, batch):
    ours, theirs, path = pair
    truth = outputs(in_float64(theirs, path), batch)
    assert_model_no_worse(outputs(ours, batch), outputs(theirs, batch), truth)


def test_without_padding_and_ragged_are_the_same(pair, batch):
    ours, theirs, path = pair
    ids, mask, labels = batch.values()
    source, target = mask.bool(), labels != -100
    with torch.no_grad():
        padded = ours(**batch)
        ragged = ours(
            ids[source],
            labels=labels[target],
            cu_seqlens=torch.tensor([0, 5, 15, 22]).int(),
            decoder_cu_seqlens=torch.tensor([0, 8, 11, 17]).int(),
        )
        assert torch.equal(ragged.logits, padded.logits[target])
        assert torch.equal(ragged.loss, padded.loss)
        skipped = ours(**batch, skip_logits=True)
        assert skipped.logits is None
        inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(0)[:, :7]}
        wide = in_float64(theirs, path)
        losses = skipped.loss, theirs(**batch).loss, wide(**batch).loss
        fields = (
            {"logits": m(**inputs).logits, "loss": loss}
            for m, loss in zip((ours, theirs, wide), losses, strict=True)
        )
        assert_model_no_worse(*fields)


def test_labels_may_be_missing_anywhere(pair, batch):
    ours, theirs, path = pair
    labels = batch["labels"].clone()
    labels[0, 2], labels[1] = -100, -100
    batch["labels"] = labels
    with torch.no_grad():
        three = (fields_of(m, batch) for m in (ours, theirs, in_float64(theirs, path)))
        assert_model_no_worse(*three)


def test_the_decoder_goes_no_further_than_the_last_label():
    counts = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert _up_to_last(counts).int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_a_source_may_have_its_padding_anywhere(pair, batch):
    """BART counts columns, so its padding on the left moves nothing; T5 knows distances alone."""
    ours, theirs, path = pair
    batch |= {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        three = (fields_of(m, batch) for m in (ours, theirs, in_float64(theirs, path)))
        assert_model_no_worse(*three)


def test_greedy_text_is_hugging_faces(pair, batch):
    ours, theirs, _ = pair
    ids, mask, _ = batch.values()
    actual = ours.generate(ids, mask, max_new_tokens=12)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(actual, expected)
    texts = {tuple(row.tolist()) for row in actual}
    assert len(texts) > 1  # the sources matter


def test_forced_tokens_come_first_and_last(pair, batch, monkeypatch):
    ours, *_ = pair
    forced = {"forced_bos_token_id": 9, "forced_eos_token_id": 8}
    monkeypatch.setattr(ours, "generation", ours.generation | forced)
    rows = ours.generate(batch["input_ids"], max_new_tokens=5, eos_token_id=[])
    assert (rows[:, 1] == 9).all() and (rows[:, 5] == 8).all() and rows.shape == (3, 6)


def test_folders_go_back(pair, tmp_path):
    ours, _, path = pair
    assert type(models.AutoModelForSeq2SeqLM.from_pretrained(path)) is type(ours)
    assert_written_as_read(transformers, path, ours, tmp_path)


RATES = ["dropout_p", "attention_dropout_p", "activation_dropout_p", "output_dropout_p"]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("pair", ["t5"], indirect=True)
def test_drops_out_in_training_only(pair, batch, rate):
    ours, *_ = pair
    dropping = type(ours)(replace(ours.config, **{rate: 0.5}))
    with torch.no_grad():
        first, second = (dropping(**batch).loss for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (dropping.eval()(**batch).loss for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"labels": None}, "decoder_input_ids or labels must be given; got neither"),
        (
            {"decoder_input_ids": torch.full((2, 8), 5)},
            r"labels must have shape \(2, 8\) like decoder_input_ids; got \(3, 8\)",
        ),
        (
            {"labels": None, "decoder_input_ids": torch.full((2, 8), 5)},
            "decoder_input_ids must have 3 rows like input_ids; got 2",
        ),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens and decoder_cu_seqlens must come toge"),
        ({"input_ids": torch.full((3, 10), 61)}, r"input_ids must be in \[0, 61\); got 61"),
    ],
)
def test_bad_batches_are_one_sentence(pair, batch, changes, sentence):
    ours, *_ = pair
    with pytest.raises(ValueError, match=f"^{type(ours).__name__}: {sentence}"):
        ours(**(batch | changes))


def test_a_start_token_that_is_not_there_is_one_sentence(pair, batch, monkeypatch):
    ours, *_ = pair
    monkeypatch.setattr(ours, "generation", {"decoder_start_token_id": None})
    with pytest.raises(ValueError, match="config.json must have decoder_start_token_id"):
        ours(**batch)
