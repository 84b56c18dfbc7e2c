"""The pretrain command, run for real on a small corpus."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tyro")
from slimkernels.data import read_documents, sample_path
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.scripts.pretrain import Options, main
from slimkernels.training import checkpoint


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight short documents of the sample."""
    path = tmp_path_factory.mktemp("corpus") / "small.jsonl"
    documents = read_documents(sample_path())[:8]
    path.write_text("".join(json.dumps({"text": text[:6000]}) + "\n" for text in documents))
    return path


SMALL = [
    *("--steps", "6", "--hidden-size", "32", "--num-layers", "1", "--num-heads", "2"),
    *("--vocab-size", "512", "--max-length", "32", "--tokens-per-batch", "128"),
    *("--heldout-batches", "2", "--warmup-steps", "2", "--checkpoint-every", "3"),
    *("--compare-steps", "1", "--device", "cpu"),
]


def run(corpus, out, *arguments):
    return main([*SMALL, "--corpus", str(corpus), "--out", str(out), *arguments])


def test_the_whole_road(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path) == 0
    said = capsys.readouterr().out
    assert re.search(r"MLM fell by -?\d+\.\d\d nats", said)
    assert re.search(r"reference in plain PyTorch .* \d+ ms, \d+\.\d\d times as long", said)
    assert said.count("  ->  ") == 4

    folder = tmp_path / "001"
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and rows[-1]["tokens_per_second"] > 0
    results = json.loads((folder / "results.json").read_text())
    # An untrained model knows nothing: the logarithm of the vocabulary, give or take its noise.
    assert abs(results["heldout_at_start"]["mlm_loss"] - torch.tensor(512.0).log()) < 0.3

    config = TransformerConfig.from_dict(json.loads((folder / "config.json").read_text()))
    model = BertForPreTraining(config)
    checkpoint.load_model(folder / "model.safetensors", model)


def test_a_sentence_longer_than_the_model_takes_is_left_out(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--max-length", "8") == 0
    said = capsys.readouterr().out
    assert re.search(r"left out: it has \d+ tokens, and the model takes 8", said)
    assert (tmp_path / "001" / "results.json").exists()


def test_a_second_run_leaves_the_first_alone(corpus, tmp_path):
    assert run(corpus, tmp_path, "--steps", "2") == 0
    first = sorted((tmp_path / "001").rglob("*"))
    assert run(corpus, tmp_path, "--steps", "2") == 0
    assert sorted((tmp_path / "001").rglob("*")) == first and (tmp_path / "002").is_dir()


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_an_interrupted_run_resumes_bit_for_bit(corpus, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(corpus, whole) == 0
    assert run(corpus, parts) == 0
    # As if it had been interrupted after the checkpoint of step 3.
    (parts / "001" / "model.safetensors").unlink()
    (parts / "001" / "step-00000006").rename(tmp_path / "gone")
    assert main(["--resume", "--out", str(parts), "--device", "cpu"]) == 0
    assert "Going on from step 3" in capsys.readouterr().out
    expected, resumed = weights(whole / "001"), weights(parts / "001")
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


def test_a_run_killed_before_its_first_checkpoint_starts_again(corpus, tmp_path):
    """What is left then is the checkpoint of step 0, whose optimizer has no moments, and a log."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(corpus, whole) == 0
    assert run(corpus, parts, "--checkpoint-every", "100") == 0
    (parts / "001" / "step-00000006").rename(tmp_path / "gone")
    with (parts / "001" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "mlm_l')
    assert main(["--resume", "--out", str(parts), "--device", "cpu"]) == 0
    expected, resumed = weights(whole / "001"), weights(parts / "001")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    rows = [json.loads(line) for line in (parts / "001" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [6]


def test_ctrl_c_leaves_a_checkpoint(corpus, tmp_path):
    script = (
        "import sys; from slimkernels.scripts.pretrain import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [*SMALL, "--corpus", str(corpus), "--out", str(tmp_path), "--steps", "100000"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, deadline = tmp_path / "001" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    step = int(re.search(r"Interrupted at step (\d+)", said)[1])
    assert (tmp_path / "001" / f"step-{step:08d}" / "model.safetensors").exists()
    assert "slimkernels pretrain --resume --out" in said


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--corpus", "/nonexistent/text.jsonl"], "nonexistent/text.jsonl"),
        (
            ["--hidden-size", "30", "--num-heads", "4"],
            "hidden_size must be a multiple of num_heads",
        ),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--warmup-steps", "-1"], "--warmup-steps must be at least 0; got -1"),
        (["--heldout-batches", "0"], "--heldout-batches must be at least 1; got 0"),
        (["--weight-decay", "nan"], "--weight-decay must be at least 0.0; got nan"),
        (["--lr", "-1"], "--lr must be positive; got -1.0"),
        (["--max-grad-norm", "inf"], "--max-grad-norm must be positive; got inf"),
        (["--dropout", "1.5"], r"dropout_p must be a number in \[0, 1\); got 1.5"),
        (["--device", "quantum"], "the device 'quantum' cannot be used"),
        (["--max-length", "4"], "--max-length must be at least 8; got 4"),
        (["--vocab-size", "10"], "--vocab-size must be at least 64; got 10"),
        (["--device", "meta"], "the device 'meta' cannot be used: it must be cpu, cuda or cuda:N"),
        (["--tokens-per-batch", "16"], "tokens_per_batch must be at least the longest example"),
        (["--resume"], "there is no run with a checkpoint under"),
    ],
)
def test_bad_input_is_one_sentence(corpus, tmp_path, capsys, arguments, sentence):
    assert run(corpus, tmp_path, *arguments) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(sentence, said[-1]) and "Traceback" not in "".join(said)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--lr", "0"),
        ("--vocab-size", "10"),
        ("--max-length", "4"),
        ("--tokens-per-batch", "16"),
        ("--corpus", "/nonexistent/text.jsonl"),
        ("--device", "meta"),
        ("--seed", str(2**64)),
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_is_refused_leaves_no_folder(corpus, tmp_path, arguments):
    assert run(corpus, tmp_path, *arguments) == 1
    assert not list(tmp_path.iterdir())


def test_resume_passes_over_a_run_without_a_checkpoint(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--steps", "2") == 0
    (tmp_path / "002").mkdir()
    assert main(["--resume", "--out", str(tmp_path)]) == 0
    assert "Going on from step 2" in capsys.readouterr().out
    assert not list((tmp_path / "002").iterdir())


def test_resume_keeps_the_runs_options(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path, "--steps", "2") == 0
    for option, typed, sentence in (
        ("--steps", "9", "--steps was 2 and cannot become 9"),
        ("--steps", "500", "--steps was 2 and cannot become 500"),  # the default, but typed
        ("--lr", "0.002", None),  # what it was
        ("--precision", "float32", None),  # what "auto" was
        ("--precision", "bfloat16", "--precision was auto and cannot become bfloat16"),
        ("--corpus", "None", f"--corpus was {corpus} and cannot become None"),
    ):
        assert main(["--resume", "--out", str(tmp_path), option, typed]) == (1 if sentence else 0)
        assert (sentence or "") in capsys.readouterr().err


def test_resume_keeps_device_and_precision(corpus, tmp_path, monkeypatch, capsys):
    """As on a machine that has got a GPU since, where "auto" would choose it and bfloat16."""
    auto = [*SMALL, "--corpus", str(corpus), "--out", str(tmp_path), "--steps", "2"]
    with monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        assert main([*auto, "--device", "auto"]) == 0
    trainer = checkpoint.read_trainer(checkpoint.latest(tmp_path / "001"))
    assert (trainer["device"], trainer["precision"]) == ("cpu", "float32")
    assert trainer["options"]["device"] == trainer["options"]["precision"] == "auto"

    def auto_is_asked(name, device):
        assert name != "auto"
        return getattr(torch, name)

    with monkeypatch.context() as since:
        since.setattr("slimkernels.scripts.pretrain.resolve_precision", auto_is_asked)
        assert main(["--resume", "--out", str(tmp_path)]) == 0
    assert "Device cpu; matrix products in torch.float32" in capsys.readouterr().out
    # Another device is asked for by name, and then "auto" is that device's.
    assert main(["--resume", "--out", str(tmp_path), "--device", "meta"]) == 1
    assert "the device 'meta' cannot be used" in capsys.readouterr().err


FILES = ["model.safetensors", "optimizer.safetensors", "trainer.json"]


def cut(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_checkpoint_is_named(corpus, tmp_path, capsys, name):
    """When none is left that can be read."""
    assert run(corpus, tmp_path, "--steps", "2") == 0
    for folder in checkpoint.folders(tmp_path / "001"):
        cut(folder / name)
    assert main(["--resume", "--out", str(tmp_path)]) == 1
    assert f"step-00000002/{name} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_resume_goes_back_to_an_older_checkpoint(corpus, tmp_path, capsys, name):
    assert run(corpus, tmp_path) == 0
    expected = weights(tmp_path / "001")
    cut(tmp_path / "001" / "step-00000006" / name)
    assert main(["--resume", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"step-00000006/{name} cannot be read: .*; going back to step-00000003", said)
    assert "Going on from step 3" in said
    resumed = weights(tmp_path / "001")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_the_options_are_these():
    """A frozen list: an option more is a decision, not an accident."""
    assert list(Options.__dataclass_fields__) == [
        *("corpus", "out", "resume", "device", "precision"),
        *("hidden_size", "num_layers", "num_heads", "vocab_size", "max_length"),
        *("tokens_per_batch", "steps", "lr", "warmup_steps", "weight_decay", "max_grad_norm"),
        *("dropout", "seed", "heldout_batches", "checkpoint_every", "compare_steps"),
    ]
