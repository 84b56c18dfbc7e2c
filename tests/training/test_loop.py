"""The training loop: what it reports, what it saves, and what it refuses to save."""

import math

import pytest
import torch
from safetensors.torch import load_file

from slimkernels.data import Batch
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.testing import assert_no_worse
from slimkernels.training import loop
from slimkernels.training.loop import Run, TrainingError, train, training_step
from slimkernels.training.optim import adamw

CONFIG = TransformerConfig(
    vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=8
)
TOTAL, EVERY = 12, 4  # the loop reports at steps 10 and 12


class Batches:
    """The same two sequences at every step."""

    def __getitem__(self, step):
        ids = torch.arange(11) % 40
        return Batch(
            input_ids=ids,
            segment_ids=torch.zeros_like(ids),
            position_ids=torch.cat([torch.arange(6), torch.arange(5)]),
            cu_seqlens=torch.tensor([0, 6, 11], dtype=torch.int32),
            masked_positions=torch.tensor([2, 8]),
            masked_labels=torch.tensor([7, 9]),
            next_sentence_labels=torch.tensor([0, 1]),
        )


def a_run(folder, **changes):
    torch.manual_seed(0)
    model = BertForPreTraining(CONFIG)
    settings = {
        "model": model,
        "optimizer": adamw(model, 1e-3, weight_decay=0.01),
        "batches": Batches(),
        "device": torch.device("cpu"),
        "precision": torch.float32,
        "total_steps": TOTAL,
        "peak_lr": 1e-3,
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "checkpoints": folder,
        "checkpoint_every": EVERY,
    }
    return Run(**settings | changes)


def poison_gradient(run, step, value=math.nan):
    """The gradient of one bias is `value` in the step that ends as number `step`."""
    bias = run.model.pooler.bias
    bias.register_hook(lambda g: torch.full_like(g, value) if run.step == step - 1 else g)


def kept(folder):
    return {int(path.name[5:]): path for path in folder.glob("step-*")}


def test_it_reports_and_saves(tmp_path):
    run, reports = a_run(tmp_path), []
    assert train(run, lambda step, measured: reports.append((step, measured)))
    assert [step for step, _ in reports] == [10, 12]
    assert reports[-1][1]["mlm_loss"] < reports[0][1]["mlm_loss"]
    assert sorted(kept(tmp_path)) == [8, 12]


def test_an_interruption_ends_after_the_step_under_way(tmp_path):
    run = a_run(tmp_path)

    def stop(step, measured):
        run.interrupt.asked = True

    assert not train(run, stop, report_every=3)
    assert run.step == 3 and sorted(kept(tmp_path)) == [3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "step, remain", [(4, []), (6, [4]), (8, [4]), (9, [4, 8]), (11, [4, 8]), (12, [4, 8])]
)
def test_what_is_not_finite_is_never_saved(tmp_path, step, remain, value):
    run = a_run(tmp_path)
    poison_gradient(run, step, value)
    with pytest.raises(TrainingError, match="not finite at step .* checkpoint is untouched"):
        train(run, lambda step, measured: None)
    assert sorted(kept(tmp_path)) == remain
    for path in kept(tmp_path).values():
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert all(value.isfinite().all() for value in load_file(path / name).values())


def test_a_parameter_that_overflows_is_never_saved(tmp_path):
    """The loss of that step is finite still: only the next one would tell."""
    run = a_run(tmp_path, total_steps=1)
    bias = run.model.pooler.bias

    def overflow(gradient):
        bias.data.fill_(math.inf)
        return torch.zeros_like(gradient)

    bias.register_hook(overflow)
    with pytest.raises(TrainingError, match="not finite at step 1"):
        train(run, lambda step, measured: None, report_every=5)
    assert not kept(tmp_path)


def test_our_optimizer_takes_torchs_steps(tmp_path):
    measured = []
    for is_torchs, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.float64)):
        run = a_run(tmp_path)
        run.optimizer = adamw(run.model.to(dtype), 1e-2, weight_decay=0.1, is_torchs=is_torchs)
        measured.append(torch.stack([training_step(run, Batches()[0], 1e-2) for _ in range(12)]))
    ours, theirs, truth = measured
    assert_no_worse(ours, theirs, truth)
    assert ours[-1, 0] < ours[0, 0]


@pytest.mark.parametrize("is_torchs", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, is_torchs):
    run = a_run(tmp_path)
    run.optimizer = adamw(run.model, 1e-3, weight_decay=0.01, is_torchs=is_torchs)
    training_step(run, Batches()[0], 1e-3)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    run.step = 1
    poison_gradient(run, 2)
    assert not training_step(run, Batches()[1], 1e-3).isfinite().all()
    assert all(torch.equal(value, before[n]) for n, value in run.model.state_dict().items())
    after = [s["exp_avg"] for s in run.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))
    run.step = 2
    training_step(run, Batches()[2], 1e-3)
    assert not torch.equal(run.model.pooler.weight, before["pooler.weight"])


def test_nothing_is_read_between_reports_and_checkpoints(tmp_path, monkeypatch):
    """A check a checkpoint, and one at the end: each waits for the device once."""
    checked = []
    monkeypatch.setattr(loop, "_require_finite", lambda run, losses: checked.append(run.step))
    train(a_run(tmp_path), lambda step, measured: None)
    assert checked == [4, 8, 12]
