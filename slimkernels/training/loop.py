"""One training step, one evaluation, and the loop that strings them together."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from slimkernels.data.batch import Batch
from slimkernels.models.bert import BertForPreTraining, PretrainingOutput
from slimkernels.training import checkpoint
from slimkernels.training.meter import Meter
from slimkernels.training.optim import clip_and_step, learning_rate


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one sentence for the user."""


@dataclass
class Interrupt:
    """Whether the user has asked the run to stop: it does after the step under way."""

    asked: bool = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[Interrupt]:
        """Turn the first Ctrl-C (or SIGTERM) into a request; a second one stops at once."""

        def ask(number, frame):
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(number, ask) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, previous, strict=True):
                signal.signal(number, handler)


@dataclass
class Run:
    """Everything a training run is made of."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: object  # batches[step] is a function of the step alone: see data/packing.py
    device: torch.device
    precision: torch.dtype
    total_steps: int
    peak_lr: float
    warmup_steps: int
    max_grad_norm: float
    checkpoints: Path
    checkpoint_every: int
    trainer: dict = field(default_factory=dict)  # saved along: what the run was started with
    step: int = 0
    interrupt: Interrupt = field(default_factory=Interrupt)


def train(run: Run, report: Callable[[int, dict], None], *, report_every: int = 10) -> bool:
    """Train from run.step to run.total_steps; False if the user interrupted.

    report  called every `report_every` steps, and at the end, with the step and what was measured
            since: losses, learning rate and the meter's rates. In between nothing is read from
            the device, so the host never waits for it.

    A checkpoint is written every run.checkpoint_every steps, on interruption and at the end.
    Errors  TrainingError once a loss, a gradient or a parameter is not finite; no checkpoint has it
    """
    run.model.train()
    meter = Meter(run.model.config, run.device, run.precision)
    losses: list[Tensor] = []
    with run.interrupt.listen():
        while run.step < run.total_steps and not run.interrupt.asked:
            asked_at = time.perf_counter()
            batch = run.batches[run.step]
            meter.add(batch, time.perf_counter() - asked_at)
            lr = learning_rate(
                run.step,
                peak=run.peak_lr,
                warmup_steps=run.warmup_steps,
                total_steps=run.total_steps,
            )
            losses.append(training_step(run, batch.to(run.device, non_blocking=True), lr))
            run.step += 1
            if run.step % report_every == 0 or run.step == run.total_steps or run.interrupt.asked:
                mlm, nsp, norm = torch.stack(losses).mean(0).tolist()
                losses.clear()
                if not math.isfinite(mlm + nsp + norm):
                    raise _not_finite(run)
                measured = {"mlm_loss": mlm, "nsp_loss": nsp, "grad_norm": norm, "lr": lr}
                report(run.step, measured | meter.report())
            if run.step % run.checkpoint_every == 0 and run.step < run.total_steps:
                _require_finite(run, losses)
                save(run)
    _require_finite(run, losses)
    save(run)
    return run.step == run.total_steps


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it stands, with where and how it computes."""
    where = {"device": str(run.device), "precision": str(run.precision).removeprefix("torch.")}
    trainer = run.trainer | where
    return checkpoint.save(run.checkpoints, run.step, run.model, run.optimizer, trainer)


def _require_finite(run: Run, losses: list[Tensor]) -> None:
    """Refuse to go on to a checkpoint that would be of no use; waits for the device once."""
    tensors = [*losses, *run.model.parameters()]
    if not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():
        raise _not_finite(run)


def _not_finite(run: Run) -> TrainingError:
    return TrainingError(
        f"the loss or its gradient is not finite at step {run.step} or just before it; the last "
        f"checkpoint is untouched: try a lower learning rate than {run.peak_lr}"
    )


def ragged_losses(model: BertForPreTraining, batch: Batch) -> PretrainingOutput:
    """What is trained on: the losses of a batch without padding."""
    return model(
        batch.input_ids,
        batch.segment_ids,
        batch.position_ids,
        batch.cu_seqlens,
        batch.masked_positions,
        batch.masked_labels,
        batch.next_sentence_labels,
    )


def training_step(run: Run, batch: Batch, lr: float, losses=ragged_losses) -> Tensor:
    """Forward, backward, clip, update. (3,): MLM loss, NSP loss, gradient norm, on the device.

    Where the norm is not finite there is no update: the parameters stay as they were.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with mixed(run.device, run.precision):
        output = losses(run.model, batch)
    output.loss.backward()
    norm = clip_and_step(run.optimizer, run.max_grad_norm)
    run.optimizer.zero_grad(set_to_none=True)
    return torch.stack([output.mlm_loss.detach(), output.nsp_loss.detach(), norm.detach()]).float()


def mixed(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """The context in which matrices are in `precision` and the rest is in float32."""
    return torch.autocast(device.type, precision, precision != torch.float32)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches, device: torch.device, precision: torch.dtype
) -> dict[str, float]:
    """Losses over held-out batches, whose masks never change: nats a masked token, and a pair."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    masked = sequences = 0
    for batch in batches:
        with mixed(device, precision):
            output = ragged_losses(model, batch.to(device))
        weights = torch.tensor([len(batch.masked_positions), batch.num_sequences], device=device)
        totals += torch.stack([output.mlm_loss, output.nsp_loss]).double() * weights
        masked += len(batch.masked_positions)
        sequences += batch.num_sequences
    model.train(was_training)
    mlm, nsp = totals.tolist()
    return {"mlm_loss": mlm / max(masked, 1), "nsp_loss": nsp / max(sequences, 1)}
