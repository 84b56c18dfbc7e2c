"""How much faster a training step is on the library's kernels than in eager PyTorch."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time

import torch

from slimkernels.dispatch import use_backend
from slimkernels.training.loop import Run, training_step
from slimkernels.training.optim import adamw


def compare(run: Run, steps: int) -> str:
    """Time `steps` training steps on each side and say the ratio of their medians.

    Both sides train copies of the model on the same batches, in turns, so that a clock or a
    neighbour that changes speed changes it for both. The model of the run is not touched.
    """
    sides = {name: _copy(run) for name in ("slimkernels", "torch")}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps + 1):
        batch = run.batches[step].to(run.device)
        for name, side in sides.items():
            with use_backend("torch" if name == "torch" else None):
                took = _timed(side, batch)
            if step:  # the first step of each side warms up
                seconds[name].append(took)
    ours, eager = (statistics.median(seconds[name]) for name in ("slimkernels", "torch"))
    return (
        f"Speed: a training step takes {ours * 1e3:.0f} ms, and {eager * 1e3:.0f} ms for the same "
        f'model under use_backend("torch"): {eager / ours:.2f} times faster.'
    )


def _copy(run: Run) -> Run:
    model = copy.deepcopy(run.model).train()
    return dataclasses.replace(run, model=model, optimizer=adamw(model, 1e-5, weight_decay=0.0))


def _timed(run: Run, batch) -> float:
    _wait(run.device)
    started = time.perf_counter()
    training_step(run, batch, 1e-5)
    _wait(run.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
