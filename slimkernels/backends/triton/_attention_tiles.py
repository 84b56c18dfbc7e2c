"""How large attention's tiles are: from tables, one a GPU, never from a search at a first step.

The first file that has an entry decides: the user's own, which `slimkernels tune attention` writes;
configs/<gpu>.json, measured by us; configs/default.json, as much as the registers of sm_80, sm_90
and sm_100 hold. An entry is [BLOCK_M, BLOCK_N, num_warps, num_stages], under

    half or float    16-bit operands, or float32
    plain or rich    scores as they are, or with dropout, a mask, or anything that changes them
    forward, dq, dkdv or dbias    the kernel
    64, 128, 256 or 512    the widest head that it serves, padded to a power of two
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

SHIPPED = Path(__file__).parent / "configs"
NAMES = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"
LEAST, MOST = (16, 16, 1, 1), (512, 512, 32, 8)  # tl.dot wants 16; the others are CUDA's

Keys = tuple[str, str, str, str]
# Every place of a table, the most used first. A bias, and so its gradient, is never plain.
PLACES: list[Keys] = [
    (dtype, kind, kernel, width)
    for widths in (("64", "128"), ("256", "512"))
    for dtype in ("half", "float")
    for width in widths
    for kind in ("plain", "rich")
    for kernel in ("forward", "dq", "dkdv", "dbias")
    if (kind, kernel) != ("plain", "dbias")
]

_tried: dict[Keys, list[int]] = {}  # what trying() puts above all tables


class TableError(ValueError):
    """A table that cannot be used, in a sentence that names its file."""


def slug(device_name: str) -> str:
    """A GPU's name as a file's: 'NVIDIA H100 80GB HBM3' is nvidia-h100-80gb-hbm3."""
    return re.sub("[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_table(device_name: str) -> Path:
    """Where the user's own table of a GPU is, if there is one."""
    # Unlike Path.home(), expanduser() does not raise for a user without a home.
    home = Path(os.path.expanduser("~"))
    return home / ".config" / "slimkernels" / "attention" / f"{slug(device_name)}.json"


def tiles(
    kernel: str, width: int, dtype: torch.dtype, rich: bool, device: torch.device
) -> dict[str, int]:
    """The launch of a kernel: BLOCK_M, BLOCK_N, num_warps, num_stages.

    width   the larger of the heads' blocks
    Errors  TableError for a table that is damaged
    """
    keys = (
        "float" if dtype == torch.float32 else "half",
        "rich" if rich else "plain",
        kernel,
        str(max(width, 64)),
    )
    return dict(zip(NAMES, _tried.get(keys) or in_use(keys, device), strict=True))


def in_use(keys: Keys, device: torch.device) -> list[int]:
    """What the tables say."""
    return _entry(keys, device.type, device.index if device.type == "cuda" else None)


@contextlib.contextmanager
def trying(keys: Keys, entry: list[int]) -> Iterator[None]:
    """Inside, this entry counts, whatever the tables say. For measuring: not for threads."""
    before = dict(_tried)
    _tried[keys] = entry
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def read_table(path: Path) -> dict:
    """The table of a file, checked: a wrong number would fail much later, inside a launch.

    Errors  TableError
    """
    try:
        table = json.loads(path.read_text())
        fault = _fault(table)
    except (OSError, ValueError) as error:
        fault = str(error)
    if fault:
        raise TableError(
            f"{path} is not a table of attention's tiles: {fault}. Delete it, or make it anew "
            "with `slimkernels tune attention --again`"
        )
    return table


def write_table(path: Path, table: dict) -> None:
    """Write a table aside, then rename it: it is there whole or not at all. Later calls use it."""
    text = json.dumps(table, indent=2)
    text = re.sub(r"\[[\d,\s]+\]", lambda entry: re.sub(r"\s+", " ", entry[0]), text)
    text = text.replace("[ ", "[").replace(" ]", "]")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".writing-{path.name}")
    try:
        partial.write_text(text + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    forget_tables()


def forget_tables() -> None:
    """Read them again at the next call."""
    _entry.cache_clear()
    _tables.cache_clear()


def entries_of(table: dict, keys: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[int]]:
    """A table's entries by their keys; `made`, which says where it is from, is none of them."""
    entries = {}
    for name, below in table.items():
        if isinstance(below, dict) and len(keys) < 3 and (keys or name != "made"):
            entries |= entries_of(below, (*keys, name))
        elif keys or name != "made":
            entries[(*keys, name)] = below
    return entries


def is_current(table: dict) -> bool:
    """Whether a table was made with this Triton: another one may need more registers or memory."""
    made, here = (v.split(".")[:2] for v in (_triton_of(table), triton.__version__))
    return made in ([""], here)


def _triton_of(table: dict) -> str:
    made = table.get("made")
    return str(made.get("triton", "")) if isinstance(made, dict) else ""


def _fault(table) -> str | None:
    if not isinstance(table, dict):
        return f"it holds a {type(table).__name__}, not an object"
    for keys, entry in entries_of(table).items():
        name = "/".join(keys)
        if keys not in PLACES:
            return f"there is no entry {name}"
        if not isinstance(entry, list) or [type(n) for n in entry] != [int] * len(NAMES):
            return f"{name} must be [{', '.join(NAMES)}]; got {json.dumps(entry)}"
        for what, n, least, most in zip(NAMES, entry, LEAST, MOST, strict=True):
            power = "" if what == "num_stages" else "a power of two "
            if not least <= n <= most or (power and n & (n - 1)):
                return f"{what} of {name} must be {power}from {least} to {most}; got {n}"
    return None


@functools.cache
def _entry(keys: Keys, kind: str, index: int | None) -> list[int]:
    for table in _tables(kind, index):
        entry = table
        for key in keys:
            entry = entry.get(key, {})
        if entry:
            return entry
    raise KeyError(f"no tiles for {keys}")


@functools.cache
def _tables(kind: str, index: int | None) -> list[dict]:
    tables = [read_table(SHIPPED / "default.json")]
    if kind == "cuda":
        name = torch.cuda.get_device_name(index)
        shipped, own = SHIPPED / f"{slug(name)}.json", user_table(name)
        # os.path: Path.exists() raises for a home that this process may not look into.
        tables = [*([read_table(shipped)] if os.path.exists(shipped) else []), *tables]
        if os.path.exists(own):
            table = read_table(own)
            if is_current(table):
                return [table, *tables]
            warnings.warn(
                f"{own} was made with Triton {_triton_of(table)} and this is "
                f"{triton.__version__}, so it is not used: run `slimkernels tune attention`",
                stacklevel=2,
            )
    return tables
