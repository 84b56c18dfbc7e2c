import errno
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimkernels.training import checkpoint
from slimkernels.training.checkpoint import CheckpointError
from slimkernels.training.optim import adamw


class Tied(nn.Module):
    """Two layers that share one matrix, as a language model's embedding and head do."""

    def __init__(self, width=6):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def trained(steps=3):
    torch.manual_seed(0)
    model = Tied()
    optimizer = adamw(model, 1e-2, weight_decay=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    loss = (model(torch.randn(4, 6)) - 1).square().mean()  # draws from torch's generator
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def test_a_loaded_run_goes_on_bit_for_bit(tmp_path):
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, 3, model, optimizer, {"options": {"lr": 1}})
    expected = [step(model, optimizer) for _ in range(3)]

    again, again_optimizer = trained(steps=1)
    checkpoint.load(saved, again, again_optimizer)
    assert [step(again, again_optimizer) for _ in range(3)] == expected
    assert checkpoint.read_trainer(saved) == {"options": {"lr": 1}, "step": 3}
    assert again.second.weight is again.first.weight


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = trained()
    for number in (5, 50, 500, 5000):
        checkpoint.save(tmp_path, number, model, optimizer, {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000500", "step-00005000"]
    assert checkpoint.latest(tmp_path).name == "step-00005000"


def test_only_numbered_folders_are_checkpoints(tmp_path):
    model, optimizer = trained()
    (tmp_path / "step-00000001-good").mkdir()
    (tmp_path / "step-00000999").write_text("")
    for number in (9, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, number, model, optimizer, {})
    names = [path.name for path in checkpoint.folders(tmp_path)]
    assert names == ["step-99999999", "step-100000000"]
    assert (tmp_path / "step-00000001-good").is_dir()


def test_the_generator_is_that_of_the_runs_device(tmp_path, monkeypatch):
    """As on a second GPU, which is not torch's current device."""
    model, optimizer = trained()
    second = torch.device("cuda:1")
    states = {second: torch.tensor([7], dtype=torch.uint8)}
    monkeypatch.setattr(model, "parameters", lambda: iter([SimpleNamespace(device=second)]))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": states[device])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device="cuda": states.update({device: state})
    )
    saved = checkpoint.save(tmp_path, 1, model, optimizer, {})
    states[second] = None
    checkpoint.load(saved, model, optimizer)
    assert states.keys() == {second} and states[second].tolist() == [7]


def test_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None


def test_a_full_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch):
    model, optimizer = trained()
    checkpoint.save(tmp_path, 1, model, optimizer, {})

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="could not be written .*No space left.*untouched"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.load(checkpoint.latest(tmp_path), model, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, 1, model, optimizer, {})
    content = (saved / name).read_bytes()
    if damage == "gone":
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(
            content[: len(content) // 2] if damage == "cut" else b"\xff" * 64
        )
    with pytest.raises(CheckpointError, match=rf"the checkpoint .*{name} cannot be read"):
        checkpoint.load(saved, model, optimizer)


@pytest.mark.parametrize("content", ["{", "[]", '{"step": "three"}', None])
def test_a_damaged_trainer_is_named(tmp_path, content):
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, 1, model, optimizer, {})
    (saved / "trainer.json").unlink()
    if content is not None:
        (saved / "trainer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer\.json cannot be read"):
        checkpoint.read_trainer(saved)


def test_another_models_checkpoint_is_refused(tmp_path):
    model, optimizer = trained()
    saved = checkpoint.save(tmp_path, 1, model, optimizer, {})
    with pytest.raises(CheckpointError, match="is not of this model: size mismatch"):
        checkpoint.load(saved, Tied(width=7))
    with pytest.raises(CheckpointError, match=r"is not of this model: it lacks 0\.bias"):
        checkpoint.load(saved, nn.Sequential(nn.Linear(6, 6)))


def test_the_model_alone(tmp_path):
    model, _ = trained()
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model)
    again, _ = trained(steps=0)
    checkpoint.load_model(path, again)
    assert torch.equal(again.first.weight, model.first.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
