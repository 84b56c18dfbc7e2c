"""GPT-2 and Llama against transformers: logits, losses, gradients, and what they generate."""

import json
from pathlib import Path

import pytest
import torch
from module_cases import assert_model_no_worse
from op_cases import maybe_compiled
from pretrained_cases import assert_written_as_read, randomised, results

from slimkernels import models
from slimkernels.models.generate import Sampling

transformers = pytest.importorskip("transformers")

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 48}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 12,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | NO_DROPOUT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama 3, tied, with biases, wide heads": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA
        | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_parameters": LLAMA3}
        | {"tie_word_embeddings": True},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Ours and theirs from one folder, and the folder."""
    name, config, sizes = CASES[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, name)(
        getattr(transformers, config)(vocab_size=61, **SPECIAL, **sizes)
    )
    path = tmp_path_factory.mktemp("decoder")
    randomised(theirs).save_pretrained(path)
    return getattr(models, name).from_pretrained(path), theirs, path


@pytest.fixture
def batch():
    """Three rows, padded on the right, and labels of the real tokens."""
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9) < torch.tensor([[5], [9], [7]])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


class ExactRotary(torch.nn.Module):
    """Theirs rounds angles to float32 in a float64 model, too."""

    def __init__(self, theirs):
        super().__init__()
        D, rope = theirs.config.head_dim, theirs.config.rope_parameters
        self.frequencies = rope["rope_theta"] ** -(torch.arange(0, D, 2).double() / D)
        if rope["rope_type"] == "llama3":
            self.frequencies = theirs.model.rotary_emb.inv_freq.double()

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos().to(x), angles.sin().to(x)


def in_float64(theirs, path):
    wide = type(theirs).from_pretrained(path, dtype=torch.float64)
    if hasattr(wide, "model"):
        wide.model.rotary_emb = ExactRotary(theirs)
    return wide


def outputs(model, batch):
    y = model(**batch)
    real = batch["attention_mask"].bool()
    return results(model, {"loss": y.loss, "logits": y.logits[real]})


def test_logits_loss_and_gradients_are_hugging_faces(pair, batch):
    ours, theirs, path = pair
    truth = outputs(in_float64(theirs, path), batch)
    assert_model_no_worse(outputs(ours, batch), outputs(theirs, batch), truth)


def test_without_padding_and_ragged_are_the_same(pair, batch):
    ours, theirs, path = pair
    ids, mask = batch["input_ids"], batch["attention_mask"]
    real = mask.bool()
    ends = torch.tensor([0, 5, 14, 21], dtype=torch.int32)
    with torch.no_grad():
        padded = ours(**batch)
        ragged = ours(ids[real], labels=ids[real], cu_seqlens=ends)
        assert torch.equal(ragged.logits, padded.logits[real])
        assert torch.equal(ragged.loss, padded.loss)
        assert not padded.logits[~real].any()
        skipped = ours(**batch, skip_logits=True)
        assert skipped.logits is None
        models = theirs, in_float64(theirs, path)
        losses = skipped.loss, *(m(**batch).loss for m in models)
        whole = (m(ids, labels=ids) for m in (ours, *models))
        fields = (
            {"loss": y.loss, "logits": y.logits, "loss of skipped logits": loss}
            for y, loss in zip(whole, losses, strict=True)
        )
        assert_model_no_worse(*fields)


def test_autocast_loses_no_more_than_theirs(pair, batch):
    ours, theirs, path = pair

    def logits(model, enabled=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return {"logits": model(batch["input_ids"]).logits.float()}

    truth = logits(in_float64(theirs, path), enabled=False)
    streams = []
    hook = ours.decoder.layers[0].register_forward_hook(lambda _, __, both: streams.extend(both))
    assert_model_no_worse(logits(ours), logits(theirs), truth)
    hook.remove()
    # What blocks read is narrow, what they add up is not.
    assert [stream.dtype for stream in streams] == [torch.bfloat16, torch.float32]


def test_padding_on_the_left_moves_positions_as_theirs(pair, batch):
    ours, theirs, path = pair
    ids, mask = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    with torch.no_grad():
        fields = (
            {"logits": m(input_ids=ids, attention_mask=mask).logits[mask.bool()]}
            for m in (ours, theirs, in_float64(theirs, path))
        )
        assert_model_no_worse(*fields)


def test_greedy_text_is_hugging_faces(pair):
    """Of prompts padded on the left, as transformers wants them; and with padding on the right."""
    ours, theirs, _ = pair
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(9) >= torch.tensor([[4], [0], [2], [8]])).long()
    ids = ids.where(mask == 1, 0)
    actual = ours.generate(ids, mask, max_new_tokens=16)
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    assert torch.equal(actual, expected)
    right = [row.roll(-int((row == 0).sum())) for row in mask]
    moved = torch.stack([row.roll(int(m.sum()) - 9) for row, m in zip(ids, mask, strict=True)])
    again = ours.generate(moved, torch.stack(right), max_new_tokens=16)
    assert torch.equal(again[:, 9:], actual[:, 9:])


def test_a_row_ends_at_eos_and_is_padded(pair):
    ours, *_ = pair
    prompt = torch.tensor([[5, 9, 4], [7, 7, 8]])
    free = ours.generate(prompt, max_new_tokens=10, eos_token_id=[])
    assert free.shape == (2, 13)
    ends = [int(free[0, 5]), int(free[1, 4])]
    ended = ours.generate(prompt, max_new_tokens=10, eos_token_id=ends, pad_token_id=60)
    for row, without in zip(ended, free, strict=True):
        at = next(i for i in range(3, 13) if int(without[i]) in ends)
        assert torch.equal(row[: at + 1], without[: at + 1]) and (row[at + 1 :] == 60).all()
    assert ended.shape[1] < 13


def test_folders_go_back(pair, tmp_path):
    ours, _, path = pair
    assert type(models.AutoModelForCausalLM.from_pretrained(path)) is type(ours)
    assert_written_as_read(transformers, path, ours, tmp_path)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
def test_compiles_whole_without_a_mask(pair, batch):
    ours, theirs, path = pair
    ids = batch["input_ids"]

    def fields(model, ids):
        y = model(ids, labels=ids)
        return {"loss": y.loss, "logits": y.logits}

    with torch.no_grad():
        actual = maybe_compiled(lambda i: fields(ours, i), True)(ids)
        assert_model_no_worse(actual, fields(theirs, ids), fields(in_float64(theirs, path), ids))


def test_rotary_tables_stay_float32(pair):
    ours, *_ = pair
    if ours.config.positions != "rotary":
        pytest.skip("its positions are learned")
    half = type(ours)(ours.config).to(torch.bfloat16)
    assert half.decoder.embedding.token.weight.dtype == torch.bfloat16
    assert torch.equal(half.decoder.rotary.cos, ours.decoder.rotary.cos)


LOGITS = torch.tensor([[1.0, 4.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {1}),
        ({"top_p": 0.7}, {1, 3}),  # softmax is 0.03, 0.64, 0.09, 0.24
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_k": 3, "top_p": 0.95}, {1, 2, 3}),
        ({"temperature": 0.01}, {1}),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_likely_ones(options, kept):
    torch.manual_seed(0)
    sampling = Sampling(do_sample=True, **options)
    drawn = sampling.choose(LOGITS.expand(4000, -1))
    assert set(drawn.tolist()) == kept
    weights = (LOGITS[0] / options.get("temperature", 1.0)).softmax(0)
    weights = torch.tensor([float(w) if i in kept else 0.0 for i, w in enumerate(weights)])
    shares = drawn.bincount(minlength=4) / 4000
    assert (shares - weights / weights.sum()).abs().max() < 0.04  # five standard deviations
    assert Sampling(False, **options).choose(LOGITS).tolist() == [1]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"max_new_tokens": 38}, "4 tokens and max_new_tokens must fit in max_positions, 40; got"),
        ({"temperature": 0.0}, "temperature must be positive; got 0.0"),
        ({"top_k": 0}, "top_k must be at least 1 or None; got 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\] or None; got 1.5"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be an integer; got '5'"),
        ({"temperature": "hot"}, "temperature must be a number; got 'hot'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer; got '</s>'"),
        ({"attention_mask": torch.zeros(1, 4)}, "attention_mask must leave a token in every row"),
    ],
)
def test_bad_generation_is_one_sentence(pair, options, sentence):
    ours, *_ = pair
    with pytest.raises(ValueError, match=f"^{type(ours).__name__}.generate: {sentence}"):
        ours.generate(torch.full((1, 4), 5), **options)


def test_what_only_transformers_generates_with_is_named(pair, monkeypatch):
    ours, *_ = pair
    name, prompt = f"{type(ours).__name__}.generate", torch.full((1, 4), 5)
    sentence = "num_beams is not implemented: .*; it takes input_ids, .*, max_new_tokens, .*_id$"
    with pytest.raises(TypeError, match=f"^{name}: {sentence}"):
        ours.generate(prompt, num_beams=2)
    folder = {"num_beams": 4, "no_repeat_ngram_size": 0, "eos_token_id": 3}
    monkeypatch.setattr(ours, "generation", folder)
    with pytest.warns(UserWarning, match=f"^{name}: the folder asks for num_beams=4, which is not"):
        ours.generate(prompt, max_new_tokens=1)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"input_ids": torch.full((1, 4), 61)}, r"input_ids must be in \[0, 61\); got 61"),
        ({"position_ids": torch.full((1, 4), 40)}, r"position_ids must be in \[0, 40\); got 40"),
        (
            {"position_ids": torch.full((3,), 4), "attention_mask": torch.ones(1, 4)},
            r"position_ids must have shape \(1, 4\) like input_ids, or \(4,\); got \(3,\)",
        ),
        ({"labels": torch.full((1, 4), 61)}, r"labels must be in \[0, 61\), or -100 .*; got 61"),
        ({"labels": torch.full((1, 3), 6)}, r"labels must have shape \(1, 4\) like input_ids"),
        ({"skip_logits": True}, "labels must be given with skip_logits"),
        (
            {"cu_seqlens": torch.tensor([0, 4]), "attention_mask": torch.ones(1, 4)},
            "attention_mask must be None with cu_seqlens",
        ),
    ],
)
def test_bad_batches_are_one_sentence(pair, changes, sentence):
    ours, *_ = pair
    with pytest.raises(ValueError, match=f"^{type(ours).__name__}: {sentence}"):
        ours(**({"input_ids": torch.full((1, 4), 5)} | changes))


@pytest.mark.parametrize(
    "entry, value, sentence",
    [
        ("hidden_act", "relu", "hidden_act must be silu or gelu or .*; got 'relu'"),
        ("mlp_bias", True, "mlp_bias must be False; got True"),
        (
            "rope_parameters",
            {"rope_type": "yarn"},
            "rope_type must be 'default' or 'llama3'; got 'yarn'",
        ),
        ("rms_norm_eps", None, "config.json must have rms_norm_eps"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps must be a positive number; got '1e-6'"),
        ("num_key_value_heads", "2", "num_key_value_heads must be an integer >= 1; got '2'"),
        ("tie_word_embeddings", "false", "tie_word_embeddings must be True or False; got 'false'"),
        ("rope_parameters", [1], r"rope_parameters must be an object; got \[1\]"),
        (
            "rope_parameters",
            {"rope_type": "llama3", "factor": 8.0},
            r"rope_parameters' factor, .* must be four numbers, or None; got \(8.0, None, None,",
        ),
    ],
)
def test_a_config_that_is_not_implemented_is_one_sentence(entry, value, sentence):
    theirs = transformers.LlamaConfig(**LLAMA).to_dict()
    theirs[entry] = value
    if value is None:
        del theirs[entry]
    with pytest.raises(ValueError, match=sentence):
        models.LlamaForCausalLM.family.from_theirs(theirs)


def test_a_trained_decoder_tells_its_story():
    """stories260K (github.com/karpathy/llama2.c): the greedy text that transformers gives."""
    path = Path(__file__).parents[3] / "shared/data/weights/stories260K"
    if not path.is_dir():
        pytest.skip("the weights of stories260K are not here")
    expected = json.loads((path / "reference.json").read_text())["greedy_ids"][:60]
    model = models.LlamaForCausalLM.from_pretrained(path)
    actual = model.generate(torch.tensor([expected[:1]]), max_new_tokens=59)
    assert actual[0].tolist() == expected
