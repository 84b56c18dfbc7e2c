"""How a training step on the library's kernels compares with one on its reference in PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time

import torch

from slimkernels.data.batch import Batch
from slimkernels.dispatch import use_backend
from slimkernels.models.bert import BertForPreTraining, PretrainingOutput
from slimkernels.ops.cross_entropy import cross_entropy
from slimkernels.training.loop import Run, ragged_losses, training_step
from slimkernels.training.optim import adamw


def compare(run: Run, steps: int) -> str:
    """Time `steps` training steps on each side and say the ratio of their medians.

    Both sides train copies of the model on the same batches, in turns, so that a clock or a
    neighbour that changes speed changes it for both. The other side is the library's reference in
    plain PyTorch, which is written to be read: torch's own fused dropout and attention would be
    faster. It is given the batches padded, the form it is good at: its ragged attention stores the
    scores between all sequences. The model of the run is not touched.
    """
    sides = {name: _copy(run, name == "torch") for name in ("slimkernels", "torch")}
    losses = {"slimkernels": ragged_losses, "torch": padded_losses}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps + 1):
        batch = run.batches[step].to(run.device)
        for name, side in sides.items():
            with use_backend("torch" if name == "torch" else None):
                took = _timed(side, batch, losses[name])
            if step:  # the first step of each side warms up
                seconds[name].append(took)
    ours, reference = (statistics.median(seconds[name]) for name in ("slimkernels", "torch"))
    return (
        f"Speed: a training step takes {ours * 1e3:.0f} ms; on the library's reference in plain "
        f'PyTorch (use_backend("torch"), padded batches) it takes {reference * 1e3:.0f} ms, '
        f"{reference / ours:.2f} times as long."
    )


def padded_losses(model: BertForPreTraining, batch: Batch) -> PretrainingOutput:
    """The losses of a batch with its padding left in: the same numbers, more work."""
    rectangles = batch.padded()
    lengths = batch.cu_seqlens.diff() if batch.padding_saved else None
    encoder = model.bert
    names = "input_ids", "token_type_ids", "position_ids"
    embedded = encoder.embed(*(rectangles[name] for name in names), None, multiplies=True)
    hidden = encoder.encode(embedded, key_lengths=lengths)  # (B, T, C)
    where = (rectangles["labels"].flatten() != -100).nonzero().squeeze(1)
    logits = model.mlm_logits(hidden.flatten(0, 1).index_select(0, where), embedded.table)
    mlm = cross_entropy(logits, rectangles["labels"].flatten()[where])
    nsp = cross_entropy(model.nsp_logits(hidden[:, 0]), batch.next_sentence_labels)
    return PretrainingOutput(mlm.float() + nsp.float(), mlm, nsp)


def _copy(run: Run, is_torchs: bool) -> Run:
    model = copy.deepcopy(run.model).train()
    optimizer = adamw(model, 1e-5, weight_decay=0.0, is_torchs=is_torchs)
    return dataclasses.replace(run, model=model, optimizer=optimizer)


def _timed(run: Run, batch: Batch, losses) -> float:
    _wait(run.device)
    started = time.perf_counter()
    training_step(run, batch, 1e-5, losses)
    _wait(run.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
