"""Numbered folders for runs, so that no run ever writes over another's, and their small files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from slimkernels.training import checkpoint


def start_run(parent: Path) -> Path:
    """Make and return the next free folder: ``parent/001``, ``parent/002``, ...

    Errors  ValueError in one sentence if `parent` is no folder and cannot be made one
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror.lower()
        raise ValueError(f"--out {parent} cannot be a folder for runs: {reason}") from error
    number = max((int(folder.name) for folder in run_folders(parent)), default=0)
    while True:
        number += 1
        folder = parent / f"{number:03d}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue  # it is a file, or another run took the number in between


def newest_run(parent: Path) -> Path | None:
    """The run of the highest number that has a checkpoint; None if there is none."""
    runs = reversed(run_folders(parent))
    return next((folder for folder in runs if checkpoint.latest(folder)), None)


def run_folders(parent: Path) -> list[Path]:
    """All runs, oldest first."""
    if not parent.is_dir():
        return []
    folders = [path for path in parent.iterdir() if re.fullmatch("[0-9]+", path.name)]
    return sorted(filter(Path.is_dir, folders), key=lambda path: int(path.name))


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file aside, then rename it: it is there whole or not at all."""
    partial = path.with_name(f".writing-{path.name}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cut_log(path: Path, step: int) -> None:
    """Leave out the lines of a log that stand after `step`: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A run that was killed may have left half a line.
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    partial = path.with_name(f".writing-{path.name}")
    partial.write_text("".join(kept))
    os.replace(partial, path)
