"""What is stored in a checkpoint is judged before it is used."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from slimkernels.training import checkpoint, resume
from slimkernels.training.checkpoint import CheckpointError
from slimkernels.training.optim import adamw


@dataclass
class Options:
    corpus: Path | None = None
    out: Path = Path("runs")
    resume: bool = False
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    steps: int = 9
    lr: float = 1e-3


def saved(parent, *steps, **options):
    """A run folder with checkpoints, as a run on the GPU would leave it."""
    stored = asdict(Options(**options)) | {"out": str(parent)}
    trainer = {
        "options": stored,
        "heldout_at_start": {"mlm_loss": 6.0, "nsp_loss": 0.7},
        "device": "cuda:0",
        "precision": "bfloat16",
    }
    model = torch.nn.Linear(2, 2)
    optimizer = adamw(model, 1e-3, weight_decay=0.0)
    for step in steps:
        checkpoint.save(parent / "001", step, model, optimizer, trainer)
    return Options(out=parent, resume=True)


def change(path, *keys, value=None):
    """Set what stands under `keys` in a JSON file; None takes it out."""
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_the_options_are_restored(tmp_path):
    found = resume.newest(saved(tmp_path, 3, 6, corpus="text.jsonl", lr=1))
    assert found.checkpoint == tmp_path / "001" / "step-00000006"
    assert found.options == Options(Path("text.jsonl"), tmp_path, True, "cuda:0", "auto", 9, 1)


@pytest.mark.parametrize(
    "keys, value, sentence",
    [
        (["heldout_at_start"], None, "heldout_at_start is None"),
        (["heldout_at_start", "nsp_loss"], None, "heldout_at_start.nsp_loss is None"),
        (["heldout_at_start", "mlm_loss"], "low", "heldout_at_start.mlm_loss is 'low'"),
        (["options"], None, "options is None"),
        (["options"], [], r"options is \[\]"),
        (["options", "steps"], "many", "options.steps is 'many'"),
        (["options", "steps"], True, "options.steps is True"),
        (["options", "lr"], "fast", "options.lr is 'fast'"),
        (["options", "corpus"], 3, "options.corpus is 3"),
        (["options", "precision"], "float8", "options.precision is 'float8'"),
        (["options", "colour"], "red", "options.colour is of another version"),
        (["precision"], "float8", "precision is 'float8'"),
        (["device"], 0, "device is 0"),
        (["step"], -1, "step is -1 of 9"),
        (["step"], 10, "step is 10 of 9"),
        (["step"], True, "it has no step"),
    ],
)
def test_a_damaged_trainer_is_one_sentence(tmp_path, capsys, keys, value, sentence):
    options = saved(tmp_path, 3, 6)
    change(tmp_path / "001" / "step-00000006" / "trainer.json", *keys, value=value)
    assert resume.newest(options).checkpoint.name == "step-00000003"
    said = capsys.readouterr().out
    assert "step-00000006/trainer.json cannot be read: " in said
    assert said.endswith("; going back to step-00000003.\n")
    change(tmp_path / "001" / "step-00000003" / "trainer.json", *keys, value=value)
    with pytest.raises(CheckpointError, match=f"06/trainer.json cannot be read: {sentence}"):
        resume.newest(options)


def test_another_device_may_be_asked_for(tmp_path):
    found = resume.newest(saved(tmp_path, 3))
    own = resume.own_options(found, found.options)
    assert (own.device, own.precision) == ("cuda:0", "bfloat16")
    moved = resume.own_options(found, Options(**vars(found.options) | {"device": "cpu"}))
    assert (moved.device, moved.precision) == ("cpu", "auto")
    with pytest.raises(ValueError, match="--lr was 0.001 and cannot become 0.5"):
        resume.own_options(found, Options(**vars(found.options) | {"lr": 0.5}))


def test_no_run(tmp_path):
    with pytest.raises(ValueError, match="there is no run with a checkpoint under"):
        resume.newest(Options(out=tmp_path))
