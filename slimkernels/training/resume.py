"""Where a run goes on: the newest checkpoint that can be read, and the run's own options."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimkernels.training import checkpoint
from slimkernels.training.checkpoint import CheckpointError
from slimkernels.training.loop import Run
from slimkernels.training.runs import newest_run

# What trainer.json holds, besides the step.
TRAINER = {
    "options": dict,
    "heldout_at_start": dict,
    "device": str,
    "precision": Literal["float32", "bfloat16"],
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint, what its trainer.json holds, and of it the options, as the command's own type.

    options.device is the one that the run computed on; options.precision is as it was typed.
    """

    checkpoint: Path
    trainer: dict
    options: object


def newest(options) -> Saved:
    """The newest checkpoint that can be read, of the newest run under `options.out` with any.

    options  the command's dataclass; the run's own options are of its type
    Errors   ValueError if there is none; CheckpointError naming the file if none can be read
    """
    folder = newest_run(options.out)
    if folder is None:
        raise ValueError(f"--resume: there is no run with a checkpoint under {options.out}")
    unreadable = []
    for path in reversed(checkpoint.folders(folder)):
        try:
            saved = _read(path, options)
        except CheckpointError as error:
            unreadable.append(error)
            continue
        for error in unreadable:
            print(f"{error}; going back to {path.name}.")
        return saved
    raise unreadable[0]


def own_options(saved: Saved, asked):
    """The run's own options; only --device may differ, and with it what "auto" precision is.

    asked   what was typed, with saved.options for what was not
    Errors  ValueError naming the first option that differs
    """
    own, precision = saved.options, saved.trainer["precision"]
    for field in dataclasses.fields(own):
        was, now = getattr(own, field.name), getattr(asked, field.name)
        accepted = (was, precision) if field.name == "precision" else (was,)
        if now not in accepted and field.name != "device":
            raise ValueError(
                f"--resume goes on with the run's own options: --{field.name.replace('_', '-')} "
                f"was {was} and cannot become {now}"
            )
    return dataclasses.replace(own, precision=precision) if asked.device == own.device else asked


def go_on(run: Run, saved: Saved) -> None:
    """Put `run` at the checkpoint."""
    checkpoint.load(saved.checkpoint, run.model, run.optimizer)
    run.trainer = dict(saved.trainer)
    run.step = run.trainer.pop("step")
    print(f"Going on from step {run.step}.")


def _read(path: Path, given) -> Saved:
    checkpoint.check_readable(path)
    trainer = checkpoint.read_trainer(path)
    try:
        for name, kind in TRAINER.items():
            _require(name, trainer.get(name), kind)
        for name in ("mlm_loss", "nsp_loss"):
            _require(f"heldout_at_start.{name}", trainer["heldout_at_start"].get(name), float)
        options = _restore(type(given), trainer["options"])
        if not 0 <= trainer["step"] <= options.steps:
            raise ValueError(f"step is {trainer['step']} of {options.steps}")
    except ValueError as error:
        path = path / "trainer.json"
        raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
    changes = {"out": given.out, "resume": True, "device": trainer["device"]}
    return Saved(path, trainer, dataclasses.replace(options, **changes))


def _restore(options_type: type, stored: dict):
    """Options from JSON, where a path is a string."""
    kinds = typing.get_type_hints(options_type)
    for name, value in stored.items():
        if name not in kinds:
            raise ValueError(f"options.{name} is of another version")
        _require(f"options.{name}", value, kinds[name])
    paths = [name for name, kind in kinds.items() if kind is Path or Path in typing.get_args(kind)]
    return options_type(
        **{
            name: Path(value) if name in paths and value is not None else value
            for name, value in stored.items()
        }
    )


def _require(name: str, value: object, kind) -> None:
    if not _is(value, kind):
        raise ValueError(f"{name} is {value!r}")


def _is(value: object, kind) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is(value, one) for one in typing.get_args(kind))
    allowed = {Path: (str,), float: (int, float)}.get(kind, (kind,))
    return type(value) in allowed  # not isinstance: True is no number of steps
