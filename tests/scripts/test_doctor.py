"""slimkernels doctor on a model of random weights."""

import re
import sys
import time

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tyro", reason="tyro is not installed")

import slimkernels  # noqa: E402
from slimkernels.dispatch import Op  # noqa: E402
from slimkernels.integrations._swap import is_swapped  # noqa: E402
from slimkernels.nn import _torchs_own  # noqa: E402
from slimkernels.scripts import doctor  # noqa: E402
from slimkernels.scripts.main import main  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    transformers.BertModel(config).save_pretrained(path)
    return path


def run(*arguments):
    return doctor.main([*map(str, arguments), "--device=cpu", "--seconds=0.01"])


def test_it_says_what_is_swapped_what_runs_and_how_fast(folder, monkeypatch, capsys):
    monkeypatch.setattr(_torchs_own, "MIN_ELEMENTS", 0)  # or torch would run so small a model
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert run(folder, "--batch=4", "--length=16") == 0
    text = capsys.readouterr().out
    assert "parameters, torch.float32 on cpu" in text and "BertModel: " in text
    assert re.search(r"swapped +\d+ +torch.nn.LayerNorm", text)
    assert re.search(r"^  (add_)?layer_norm +(torch|cpu) +\d+ times$", text, re.M)
    assert re.search(r"Forward of 4 x 16 tokens, \d+% of them padding, median of \d+:", text)
    steps = re.findall(r"^(\w+) .* \.\.\. [\d.]+ s$", text, re.M)
    assert steps == ["Loading", "Looking", "A", "A", "Measuring"]
    milliseconds = [float(ms) for ms in re.findall(r"([\d.]+) ms", text)]
    ratio, error = re.search(r"([\d.]+) times as fast\n.* differ by (\S+) of", text).groups()
    assert float(ratio) == pytest.approx(milliseconds[0] / milliseconds[1], rel=0.01, abs=0.01)
    assert float(error) < 1e-5
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_difference_is_seen(folder, monkeypatch, capsys):
    outputs = doctor.outputs_of
    calls = []

    def wrong(*args):
        calls.append(args)
        y = outputs(*args)
        y[0, 0, 0] += len(calls) == 2  # the first of the swapped model
        return y

    monkeypatch.setattr(doctor, "outputs_of", wrong)
    assert run(folder, "--batch=2", "--length=8") == 0
    assert float(re.search(r"differ by (\S+) of", capsys.readouterr().out)[1]) > 0.01


def test_each_is_timed_in_its_own_state_and_the_model_left_as_it_was(folder, monkeypatch):
    model = doctor.load(str(folder))
    state = [type(m) for m in model.modules()]
    monkeypatch.setattr(
        doctor, "outputs_of", lambda m, _: time.sleep(0.02 * any(map(is_swapped, m.modules())))
    )
    (before,), (after,) = doctor.measure(model, {}, 0.0).values()  # a turn, however late it is
    assert before < 0.01 < after
    assert [type(m) for m in model.modules()] == state
    select = Op.select
    with pytest.raises(KeyError), doctor.recorded() as chosen:
        slimkernels.gelu(torch.ones(3))
        raise KeyError
    assert sum(chosen.values()) == 1 and Op.select is select


def test_each_choice_is_counted_where_the_call_is_known_too():
    x = torch.ones(2, 8)
    for _ in range(2):
        slimkernels.linear(x, x)
        with doctor.recorded() as chosen:
            for _ in range(3):
                slimkernels.linear(x, x)
        assert chosen == {("linear", "torch"): 3}


def test_the_batch_is_padded_and_ends_rows(folder):
    model = doctor.load(str(folder))
    batch = doctor.padded_batch(model, 8, 32)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask[0].all() and 0.2 < mask.float().mean() < 0.8
    assert torch.equal(mask.cummin(1).values, mask)
    assert torch.equal(ids == model.config.pad_token_id, mask == 0)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["/no/such/model"], "model must be a folder, or .*; /no/such/model does not exist\n"),
        (["no/such/model"], "model must be a folder, or .*; no/such/model does not exist\n"),
        ([__file__], f"model must be a folder, or .*; {re.escape(__file__)} is a file\n"),
        (["FOLDER", "--length=41"], "--length must be at most 40, which the model allows; got 41"),
        (["FOLDER", "--batch=0"], "--batch must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments, sentence, folder, capsys):
    assert run(*(folder if a == "FOLDER" else a for a in arguments)) == 1
    error = capsys.readouterr().err
    assert re.match(f"slimkernels doctor: {sentence}", error) and error.count("\n") == 1


def test_a_damaged_folder_is_one_sentence(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert message.startswith("slimkernels doctor: ") and message.count("\n") == 1


def test_without_transformers_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "slimkernels.scripts.doctor")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["doctor", "x"]) == 1
    sentence = 'slimkernels doctor needs transformers: pip install "slimkernels[hf]"\n'
    assert capsys.readouterr().err == sentence
