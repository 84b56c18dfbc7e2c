import pytest
import torch
from module_cases import assert_model_no_worse

from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.models.convert_bert import (
    bert_from_hugging_face,
    bert_to_hugging_face,
    config_from_hugging_face,
)

transformers = pytest.importorskip("transformers")


def hugging_face(attention="sdpa", **changes):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": 14,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "attn_implementation": attention,
    }
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**(sizes | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model


def ours_of(theirs):
    ours = BertForPreTraining(config_from_hugging_face(theirs.config))
    ours.load_state_dict(bert_from_hugging_face(theirs.state_dict()))
    return ours.to(next(theirs.parameters()).dtype)


def our_results(theirs, rectangles):
    model = ours_of(theirs)
    output = model.forward_padded(**rectangles)
    output.loss.backward()
    return {"loss": output.loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def their_results(model, rectangles):
    """Their loss, and their gradients under our names."""
    model.zero_grad()
    loss = model(**rectangles).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | bert_from_hugging_face(gradients)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_loss_and_gradients_are_hugging_faces(rectangles, attention, activation):
    # Their table of embeddings has no gradient at the padding id, from real tokens either.
    rectangles["input_ids"] = rectangles["input_ids"].clamp(min=1)
    theirs = hugging_face(attention, hidden_act=activation)
    actual, eager = our_results(theirs, rectangles), their_results(theirs, rectangles)
    theirs.double()
    truth = their_results(theirs, rectangles)
    assert_model_no_worse(actual, eager, truth)
    # In float64 the two agree to the last place of float32.
    wide, truth = (
        {name: t.float() for name, t in results.items()}
        for results in (our_results(theirs, rectangles), truth)
    )
    assert_model_no_worse(wide, truth, truth)


def test_logits_are_hugging_faces(rectangles):
    theirs = hugging_face().eval()
    ours = ours_of(theirs)
    ids, mask = rectangles["input_ids"], rectangles["attention_mask"]

    def our_logits(model):
        hidden = model.bert(ids, key_lengths=mask.sum(1, dtype=torch.int32))
        return {"mlm": model.mlm_logits(hidden), "nsp": model.nsp_logits(hidden[:, 0])}

    def their_logits(model):
        output = model(ids, mask)
        return {"mlm": output.prediction_logits, "nsp": output.seq_relationship_logits}

    with torch.no_grad():
        actual, eager = our_logits(ours), their_logits(theirs)
        truth = their_logits(theirs.double())
    real = mask.bool()
    for logits in (actual, eager, truth):
        logits["mlm"] = logits["mlm"][real]
    assert_model_no_worse(actual, eager, truth)


def test_goes_there_and_back():
    theirs = hugging_face()
    state = theirs.state_dict()
    back = bert_to_hugging_face(ours_of(theirs).state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    own = [tensor for name, tensor in back.items() if "cls.predictions.decoder" not in name]
    assert len({tensor.untyped_storage().data_ptr() for tensor in own}) == len(own)
    other = hugging_face(initializer_range=0.5)
    other.load_state_dict(back)


def test_reads_the_names_of_the_first_checkpoints():
    state = hugging_face().state_dict()
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in state.items()
    } | {"bert.embeddings.position_ids": torch.arange(14)[None]}
    expected, actual = bert_from_hugging_face(state), bert_from_hugging_face(old)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_config_has_their_sizes():
    theirs = transformers.BertConfig(hidden_act="gelu_new", type_vocab_size=3)
    config = config_from_hugging_face(theirs.to_dict())
    assert config == TransformerConfig(activation="gelu_tanh", type_vocab_size=3)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda s: bert_from_hugging_face(s | {"bert.x.weight": 0}), "has no parameter bert.x.wei"),
        (
            lambda s: bert_from_hugging_face(s | {"bert.embeddings.word_embeddings.bias": 0}),
            "has no parameter bert.embeddings.word_embeddings.bias",
        ),
        (lambda s: bert_to_hugging_face({"bert.layers.0.x.bias": 0}), "has no parameter bert.lay"),
        (
            lambda s: config_from_hugging_face(transformers.BertConfig(hidden_act="relu")),
            "hidden_act must be gelu or .*; got 'relu'",
        ),
        (
            lambda s: config_from_hugging_face(
                transformers.BertConfig().to_dict() | {"position_embedding_type": "relative_key"}
            ),
            "position_embedding_type must be 'absolute'; got 'relative_key'",
        ),
        (
            lambda s: config_from_hugging_face(transformers.BertConfig(tie_word_embeddings=False)),
            "tie_word_embeddings must be True, .*; got False",
        ),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(hugging_face().state_dict())


def test_every_missing_name_is_refused():
    """Of every tensor, not only of those that are joined; the constants and ties may be missing."""
    state = hugging_face().state_dict()
    needed = [name for name in state if not name.startswith("cls.predictions.decoder.")]
    for missing in needed:
        fewer = {name: state[name] for name in needed if name != missing}
        with pytest.raises(ValueError, match=f"^bert_from_hugging_face: {missing} is missing$"):
            bert_from_hugging_face(fewer)
    tied = {name: state[name] for name in needed}
    assert bert_from_hugging_face(tied).keys() == bert_from_hugging_face(state).keys()


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_an_untied_decoder_is_refused(kind):
    theirs = hugging_face(tie_word_embeddings=False)
    untied = theirs.state_dict()
    name = f"cls.predictions.decoder.{kind}"
    with pytest.raises(ValueError, match="^bert_from_hugging_face: cls.predictions.decoder.* must"):
        bert_from_hugging_face(untied)
    state = hugging_face().state_dict()
    with pytest.raises(ValueError, match=f"^bert_from_hugging_face: {name} must equal .*differs$"):
        bert_from_hugging_face(state | {name: state[name] + 1})
