"""Checkpoints that survive interruption: written aside, then renamed; safetensors and JSON only.

A checkpoint is a folder ``step-00000300`` with

    model.safetensors       the parameters
    optimizer.safetensors   moments of each parameter, and the states of the random generators
    trainer.json            the step, and what the run was started with

No pickle: loading a checkpoint runs no code of whoever wrote it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KEEP = 2  # the newest ones: an older one remains if the newest cannot be read


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message is one sentence for the user."""


def save(folder: Path, step: int, model: nn.Module, optimizer, trainer: dict) -> Path:
    """Write a checkpoint of `step` under `folder`, then delete all but the newest ones.

    Errors  CheckpointError if the disk refuses, with the earlier checkpoints untouched
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".writing-{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tensors(partial / "model.safetensors", unique_tensors(model))
        _write_tensors(partial / "optimizer.safetensors", _optimizer_tensors(model, optimizer))
        (partial / "trainer.json").write_text(json.dumps({**trainer, "step": step}, indent=2))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint {final} could not be written ({error}); earlier ones are untouched"
        ) from error
    for old in folders(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`; None if there is none."""
    return next(reversed(folders(folder)), None)


def folders(folder: Path) -> list[Path]:
    """The complete checkpoints under `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]
    return sorted(filter(Path.is_dir, found), key=lambda path: int(path.name[5:]))


def read_trainer(checkpoint: Path) -> dict:
    """What the run was started with, and its step."""
    path = checkpoint / "trainer.json"
    try:
        trainer = json.loads(path.read_text())
        if not isinstance(trainer, dict) or type(trainer.get("step")) is not int:
            raise ValueError("it has no step")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return trainer


def check_readable(checkpoint: Path) -> None:
    """CheckpointError naming a file of tensors that is missing or damaged; reads none of them."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass  # the header is read, and compared with the size of the file
        except (OSError, SafetensorError) as error:
            raise _unreadable(checkpoint / name, error) from error


def load(checkpoint: Path, model: nn.Module, optimizer=None) -> None:
    """Put a checkpoint's parameters, moments and generator states into place.

    Errors  CheckpointError naming the file that is missing, damaged or of another model
    """
    load_model(checkpoint / "model.safetensors", model)
    if optimizer is None:
        return
    path = checkpoint / "optimizer.safetensors"
    tensors = _read_tensors(path)
    try:
        # Before the first step the optimizer has no moments, and the file has none.
        started = any(name.startswith("exp_avg.") for name in tensors)
        for name, parameter in _named_parameters(model) if started else ():
            state = optimizer.state[parameter]
            for key in ("step", "exp_avg", "exp_avg_sq"):
                state[key] = tensors[f"{key}.{name}"].to(parameter.device)
            for key in ("max_exp_avg_sq", "master"):  # which not every optimizer has
                if f"{key}.{name}" in tensors:
                    state[key] = tensors[f"{key}.{name}"].to(parameter.device)
        _set_generators(tensors, _device(model))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint {path} is not of this model: {error}") from error


def load_model(path: Path, model: nn.Module) -> None:
    """Put the parameters of one safetensors file into `model`."""
    tensors = _read_tensors(path)
    missing = unique_tensors(model).keys() - tensors.keys()
    if missing:
        raise CheckpointError(
            f"the checkpoint {path} is not of this model: it lacks {sorted(missing)[0]}"
        )
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        sentence = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"the checkpoint {path} is not of this model: {sentence}") from error


def save_model(path: Path, model: nn.Module) -> None:
    """Write the parameters alone, for use elsewhere; aside first, then renamed."""
    partial = path.with_name(f".writing-{path.name}")
    try:
        _write_tensors(partial, unique_tensors(model))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"{path} could not be written ({error})") from error


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tied parameter once: safetensors refuses shared memory."""
    seen, unique = set(), {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or value.numel() == 0:
            seen.add(value.data_ptr())
            unique[name] = value.detach().contiguous()
    return unique


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _optimizer_tensors(model: nn.Module, optimizer) -> dict[str, Tensor]:
    tensors = {"generator.cpu": torch.get_rng_state()}
    device = _device(model)
    if device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(device)
    for name, parameter in _named_parameters(model):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    return tensors


def _set_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(tensors["generator.cpu"])
    if device.type == "cuda" and "generator.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["generator.cuda"], device)


def _device(model: nn.Module) -> torch.device:
    # The run's own: torch's current device need not be the one that it trains on.
    return next(model.parameters()).device


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: value.cpu() for name, value in tensors.items()}, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the checkpoint {path} cannot be read: {error}")
