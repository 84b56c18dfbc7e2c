import copy
import dataclasses
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from module_cases import assert_model_no_worse, outputs_and_gradients
from op_cases import maybe_compiled

from slimkernels.dispatch import use_backend
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.training.optim import adamw


def losses(model, batch, seed=None):
    """The three losses and every gradient; `seed` fixes dropout."""
    if seed is not None:
        torch.manual_seed(seed)
    return outputs_and_gradients(model, lambda m: tuple(m(**batch)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", [None, "torch"])
def test_every_backend_gives_the_same_losses_and_gradients(
    model, batch, backend, compiled, dropout_p
):
    if dropout_p and compiled:
        pytest.skip("under torch.compile random numbers are drawn in an order of its own")
    config = dataclasses.replace(model.config, dropout_p=dropout_p, attention_dropout_p=dropout_p)
    other = BertForPreTraining(config)
    other.load_state_dict(model.state_dict())
    with use_backend("torch"):
        eager = losses(other, batch, seed=3)
        truth = losses(copy.deepcopy(other).double(), batch, seed=3)
    function = maybe_compiled(other, compiled)
    torch.manual_seed(3)
    with use_backend(backend):
        actual = outputs_and_gradients(other, lambda _: tuple(function(**batch)))
    assert len(actual) == 3 + len(list(model.parameters()))  # every parameter has a gradient
    assert_model_no_worse(actual, eager, truth)


def dense_losses(model, rectangles):
    """The losses computed on padded hidden states, as a model without unpadding does it."""
    lengths = rectangles["attention_mask"].sum(1, dtype=torch.int32)
    hidden = model.bert(
        rectangles["input_ids"], rectangles["token_type_ids"], key_lengths=lengths
    )  # (B, T, C)
    logits = model.mlm_logits(hidden)
    mlm = F.cross_entropy(logits.flatten(0, 1), rectangles["labels"].flatten())
    nsp = F.cross_entropy(model.nsp_logits(hidden[:, 0]), rectangles["next_sentence_label"])
    return mlm + nsp, mlm, nsp


@pytest.mark.parametrize("place", ["embedding", "dropout_p", "attention_dropout_p"])
def test_drops_out_in_training_only(model, batch, place):
    """At each place, the others being off; without blocks only the embedding can drop out."""
    rate = "dropout_p" if place == "embedding" else place
    layers = 0 if place == "embedding" else 2
    config = dataclasses.replace(model.config, num_layers=layers, **{rate: 0.5})
    dropping = BertForPreTraining(config)
    dropping.load_state_dict(model.state_dict(), strict=layers > 0)
    inputs = [batch[name] for name in ("input_ids", "segment_ids", "position_ids", "cu_seqlens")]
    if place == "dropout_p":
        hidden = model.bert.embed(*inputs)[0]
        block = dropping.bert.layers[0]
        first, second = (block(hidden, hidden, cu_seqlens=inputs[3])[0] for _ in range(2))
    else:
        first, second = (dropping.bert(*inputs) for _ in range(2))
    assert not torch.equal(first, second)
    dropping.eval()
    assert torch.equal(dropping.bert(*inputs), dropping.bert(*inputs))
    if layers:
        assert torch.equal(dropping(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("form", ["cut out", "computed"])
def test_padding_changes_nothing(model, batch, rectangles, form, backend):
    def call(model):
        if form == "cut out":
            return tuple(model.forward_padded(**rectangles))
        return dense_losses(model, rectangles)

    with use_backend(backend):
        actual = outputs_and_gradients(model, call)
        ragged = losses(model, batch)
    assert_model_no_worse(actual, ragged, losses(copy.deepcopy(model).double(), batch))


def test_masked_positions_may_come_in_any_order_and_twice(model, batch):
    order = torch.tensor([4, 0, 5, 2, 0, 1, 3])  # one of them is the first token of a sequence
    places, labels = batch["masked_positions"].clone(), batch["masked_labels"]
    places[2] = batch["cu_seqlens"][1]
    plain = {**batch, "masked_positions": places[order], "masked_labels": labels[order]}

    def one_by_one(model):
        hidden = model.bert(
            *(batch[k] for k in ("input_ids", "segment_ids", "position_ids")), batch["cu_seqlens"]
        )
        mlm = F.cross_entropy(model.mlm_logits(hidden[places[order]]), labels[order])
        first = hidden[batch["cu_seqlens"][:-1].long()]
        nsp = F.cross_entropy(model.nsp_logits(first), batch["next_sentence_labels"])
        return mlm + nsp, mlm, nsp

    truth = outputs_and_gradients(copy.deepcopy(model).double(), one_by_one)
    assert_model_no_worse(losses(model, plain), outputs_and_gradients(model, one_by_one), truth)


def test_padding_may_stand_anywhere(model, batch):
    """Real tokens keep the places they had in the rectangle."""
    ids = torch.randint(0, 97, (2, 6))
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1]])
    labels = torch.where(mask == 1, ids, -100)
    actual = model.forward_padded(ids, mask, None, labels)
    real = mask.flatten().nonzero().squeeze(1)
    expected = model(
        ids.flatten()[real],
        None,
        real % 6,
        torch.tensor([0, 3, 8], dtype=torch.int32),
        torch.arange(8),
        ids.flatten()[real],
    )
    assert torch.equal(actual.loss, expected.loss)
    without = model.forward_padded(ids, None, None, ids)
    assert torch.equal(without.loss, model.forward_padded(ids, torch.ones(2, 6), None, ids).loss)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("changed", range(4))
def test_a_sequence_sees_no_other(model, batch, changed, backend):
    inputs = [batch[name] for name in ("input_ids", "segment_ids", "position_ids", "cu_seqlens")]
    start, end = inputs[3][changed].item(), inputs[3][changed + 1].item()
    with use_backend(backend), torch.no_grad():
        before = model.bert(*inputs)
        inputs[0] = inputs[0].clone()
        inputs[0][start:end] = (inputs[0][start:end] + 31) % 97
        after = model.bert(*inputs)
    same = (before == after).all(1)
    assert not same[start:end].any()
    assert same[:start].all() and same[end:].all()


def test_ten_steps_overfit_one_batch(config, batch):
    """From ln V, the loss of knowing nothing, to under a third of it.

    Six labels need six directions of 48, which are there. A step of AdamW moves a weight by about
    lr, so ten of 0.01 move it five times the 0.02 that it starts with: enough to learn anything.
    """
    torch.manual_seed(0)
    model = BertForPreTraining(config)
    optimizer = adamw(model, 1e-2, weight_decay=0.0)
    start = model(**batch)
    assert abs(start.mlm_loss.item() - math.log(97)) < 0.5
    assert abs(start.nsp_loss.item() - math.log(2)) < 0.2
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model(**batch).loss.item() < 0.3 * math.log(97)


def test_defaults_are_what_they_say(model, batch):
    explicit = model(**batch)
    without = batch | {"segment_ids": None}
    zeros = batch | {"segment_ids": torch.zeros_like(batch["segment_ids"])}
    assert torch.equal(model(**(batch | {"position_ids": None})).loss, explicit.loss)
    assert torch.equal(model(**without).loss, model(**zeros).loss)
    alone = model(**(batch | {"next_sentence_labels": None}))
    assert torch.equal(alone.loss, explicit.mlm_loss) and alone.nsp_loss == 0
    ignored = batch["masked_labels"].clone()
    ignored[2] = -100
    keep = torch.tensor([0, 1, 3, 4, 5])
    fewer = {name: batch[name][keep] for name in ("masked_positions", "masked_labels")}
    actual = model(**(batch | {"masked_labels": ignored})).mlm_loss
    expected = model(**(batch | fewer)).mlm_loss
    wide = copy.deepcopy(model).double()(**(batch | fewer)).mlm_loss
    assert_model_no_worse({"loss": actual}, {"loss": expected}, {"loss": wide})


def test_predicts_one_place(model, batch):
    model.eval()
    ids = batch["input_ids"][:7]
    with torch.no_grad():
        expected = model.mlm_logits(model.bert(ids[None])[0])[3]
        wide = copy.deepcopy(model).double()
        truth = wide.mlm_logits(wide.bert(ids[None])[0])[3]
    actual = model.predict_masked(ids, 3)
    assert actual.shape == (97,)
    assert_model_no_worse({"y": actual}, {"y": expected}, {"y": truth})


def test_a_block_without_tokens(model):
    """As the last one is where no token of a batch has a label."""
    for options in ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, {}):
        hidden = torch.randn(0, *([] if options else [7]), model.config.hidden_size)
        y, _ = model.bert.layers[0](hidden, hidden, **options)
        assert y.shape == hidden.shape


def test_starts_as_bert_does():
    torch.manual_seed(0)
    model = BertForPreTraining(TransformerConfig.preset("tiny", vocab_size=500))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            # The sample's standard deviation is off by std / sqrt(2 n); four of those are enough.
            allowed = 4 * 0.02 / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - 0.02) < allowed, name
        else:
            one = "norm" in name and name.endswith("weight")
            assert (parameter == float(one)).all(), name


def test_copies_pickles_and_reloads(model, batch, config):
    fresh = BertForPreTraining(config)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(**batch).loss, model(**batch).loss)


@pytest.fixture
def no_kernel(model):
    """Fails a test in which the model gets as far as its embedding, the first to run a kernel."""
    model.bert.embedding.register_forward_pre_hook(lambda *_: pytest.fail("a kernel ran"))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"input_ids": torch.full((29,), 97)}, r"input_ids must be in \[0, 97\); got 97"),
        ({"input_ids": torch.full((29,), -1)}, r"input_ids must be in \[0, 97\); got -1"),
        ({"input_ids": torch.ones(29)}, "input_ids must be an int64 or int32 tensor; got torch.fl"),
        ({"input_ids": torch.ones(1, 29).long()}, r"input_ids must be \(T,\) .*; got \(1, 29\)"),
        ({"position_ids": torch.arange(29)}, r"position_ids must be in \[0, 14\); got 28"),
        ({"position_ids": torch.arange(3)}, r"must have shape \(29,\) like input_ids; got \(3,\)"),
        ({"segment_ids": torch.full((29,), 2)}, r"segment_ids must be in \[0, 2\); got 2"),
        ({"cu_seqlens": torch.tensor([0], dtype=torch.int32)}, "the batch is empty"),
        ({"cu_seqlens": torch.tensor([0, 29])}, "cu_seqlens must be an int32 tensor; got torch.i"),
        ({"cu_seqlens": torch.tensor([0, 30]).int()}, "must go from 0 to 29, .*; got 0 to 30"),
        ({"cu_seqlens": torch.tensor([0, 9, 9, 29]).int()}, "grow by at least 1 .*; it grows by 0"),
        ({"cu_seqlens": None}, "cu_seqlens must be given; forward_padded takes padded batches"),
        (
            {"masked_positions": torch.tensor([29])},
            r"masked_positions must be in \[0, 29\)",
        ),
        ({"masked_positions": torch.zeros(2, 3).long()}, r"must be \(K,\); got \(2, 3\)"),
        ({"masked_positions": [1, 3]}, "masked_positions must be an int64 .* tensor; got list"),
        (
            {"masked_labels": torch.full((6,), 97)},
            r"labels must be in \[0, 97\), or -100 .*; got 97",
        ),
        (
            {"masked_labels": torch.ones(5).long()},
            r"masked_labels must have shape \(6,\) like masked_positions; got \(5,\)",
        ),
        ({"masked_labels": None}, "masked_labels must be an int64 or .* tensor; got NoneType"),
        (
            {"next_sentence_labels": torch.full((4,), 2)},
            r"next_sentence_labels must be in \[0, 2\), .*; got 2",
        ),
        (
            {"next_sentence_labels": torch.ones(3).long()},
            r"next_sentence_labels must have shape \(4,\), one a sequence; got \(3,\)",
        ),
        ({"next_sentence_labels": [0] * 4}, "next_sentence_labels must be an int64 .*; got list"),
    ],
)
def test_bad_batches_are_one_sentence(model, batch, changes, sentence, no_kernel):
    with pytest.raises(ValueError, match="^Bert: .*" + sentence):
        model(**(batch | changes))


IDS = torch.ones(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((IDS[0],), r"input_ids must be \(B, T\) .*; got \(5,\)"),
        ((IDS[:0],), r"input_ids must be \(B, T\) with B and T at least 1; got \(0, 5\)"),
        (([1, 2],), r"input_ids must be \(B, T\) .*; got list"),
        ((IDS,), "labels must be given"),
        ((IDS, IDS[:1], None, IDS), r"attention_mask must have shape \(2, 5\) .*; got \(1, 5\)"),
        ((IDS, torch.tensor([[1] * 5, [0] * 5]), None, IDS), "attention_mask must leave .*; row 1"),
        ((IDS, IDS.tolist(), None, IDS), "attention_mask must be a tensor; got list"),
        ((IDS, IDS.numpy(), None, IDS), "attention_mask must be a tensor; got ndarray"),
        ((IDS, None, IDS.tolist(), IDS), "token_type_ids must be an int64 .* tensor; got list"),
        ((IDS, None, None, IDS.tolist()), "labels must be an int64 or int32 tensor; got list"),
        ((IDS, None, None, IDS[0]), r"labels must have shape \(2, 5\) like input_ids; got \(5,\)"),
        ((IDS, None, None, IDS, IDS[0]), r"next_sentence_label must have shape \(2,\), one a seq"),
    ],
)
def test_bad_rectangles_are_one_sentence(model, args, sentence, no_kernel):
    with pytest.raises(ValueError, match="^Bert: " + sentence):
        model.forward_padded(*args)


def test_a_place_outside_the_sequence_is_one_sentence(model):
    with pytest.raises(ValueError, match=r"position must be in \[0, 5\); got 5"):
        model.predict_masked(IDS[0], 5)


def test_lengths_in_two_forms_are_refused(model, batch, no_kernel):
    inputs = [batch[name] for name in ("input_ids", "segment_ids", "position_ids", "cu_seqlens")]
    with pytest.raises(ValueError, match="^Bert: key_lengths must be None with cu_seqlens"):
        model.bert(*inputs, key_lengths=torch.tensor([7, 1, 12, 9]).int())
