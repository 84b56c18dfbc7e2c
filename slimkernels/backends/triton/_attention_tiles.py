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

import functools
import json
import re
from pathlib import Path

import torch

SHIPPED = Path(__file__).parent / "configs"
NAMES = "BLOCK_M", "BLOCK_N", "num_warps", "num_stages"


def slug(device_name: str) -> str:
    """A GPU's name as a file's: 'NVIDIA H100 80GB HBM3' is nvidia-h100-80gb-hbm3."""
    return re.sub("[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_table(device_name: str) -> Path:
    """Where the user's own table of a GPU is, if there is one."""
    return Path.home() / ".config" / "slimkernels" / "attention" / f"{slug(device_name)}.json"


def tiles(
    kernel: str, width: int, dtype: torch.dtype, rich: bool, device: torch.device
) -> dict[str, int]:
    """The launch of a kernel: BLOCK_M, BLOCK_N, num_warps, num_stages.

    width  the larger of the heads' blocks
    """
    keys = (
        "float" if dtype == torch.float32 else "half",
        "rich" if rich else "plain",
        kernel,
        str(max(width, 64)),
    )
    index = device.index if device.type == "cuda" else None
    return dict(zip(NAMES, _entry(keys, device.type, index), strict=True))


@functools.cache
def _entry(keys: tuple[str, ...], kind: str, index: int | None) -> list[int]:
    for table in _tables(kind, index):
        entry = table
        for key in keys:
            entry = entry.get(key, {})
        if entry:
            return entry
    raise KeyError(f"no tiles for {keys}")


@functools.cache
def _tables(kind: str, index: int | None) -> list[dict]:
    paths = [SHIPPED / "default.json"]
    if kind == "cuda":
        name = torch.cuda.get_device_name(index)
        paths = [user_table(name), SHIPPED / f"{slug(name)}.json", *paths]
    return [json.loads(path.read_text()) for path in paths if path.exists()]
