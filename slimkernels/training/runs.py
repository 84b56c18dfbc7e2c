"""Numbered folders for runs, so that no run ever writes over another's."""

from __future__ import annotations

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
