"""Numbered folders for runs, so that no run ever writes over another's, and their small files."""

from __future__ import annotations

import json
import os
from pathlib import Path


def start_run(parent: Path) -> Path:
    """Make and return the next free folder: ``parent/001``, ``parent/002``, ..."""
    while True:
        numbers = [int(folder.name) for folder in run_folders(parent)]
        folder = parent / f"{max(numbers, default=0) + 1:03d}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue  # another run took the number in between


def newest_run(parent: Path) -> Path | None:
    """The run of the highest number; None if there is none."""
    folders = run_folders(parent)
    return folders[-1] if folders else None


def run_folders(parent: Path) -> list[Path]:
    """All runs, oldest first."""
    if not parent.is_dir():
        return []
    folders = [path for path in parent.iterdir() if path.is_dir() and path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))


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
