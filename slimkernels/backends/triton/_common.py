"""What every Triton backend module needs: common refusals and launch sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.dispatch import INTERPRETED

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_tensor(x: Tensor, name: str = "input") -> str | None:
    """The refusals that do not depend on the op: device and dtype."""
    if x.device.type != "cuda" and not INTERPRETED:
        return f"it needs CUDA tensors and {name} is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32 and {name} is {x.dtype}"
    return None


def dense(x: Tensor | None) -> Tensor | None:
    """An optional tensor without gaps."""
    return None if x is None else x.contiguous()


def row_block(N: int) -> tuple[int, int]:
    """The power of two that holds a row of N elements, and the warps that share it."""
    block = triton.next_power_of_2(N)
    return block, warps_of(block)


def warps_of(elements: int) -> int:
    """The warps that share a tile: 16 elements a lane fill 128-bit loads and fit in registers."""
    return min(max(elements // (32 * 16), 1), 16)


def tile_of_rows(N: int) -> tuple[int, int]:
    """Rows and columns of a tile of 2048 elements: 16 a lane of 4 warps, enough loads in flight."""
    BLOCK_N = min(max(triton.next_power_of_2(N), 16), 512)
    return 2048 // BLOCK_N, BLOCK_N


def row_programs(x: Tensor, M: int) -> int:
    """Programs that stride over M rows: a few per multiprocessor, so that each sums many rows."""
    if x.device.type != "cuda":
        return min(M, 4)
    return min(M, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)


@triton.jit
def tanh(x):
    """To float32's last digits. 1 - 2 / (e^2x + 1) cancels near 0, where Cephes' polynomial is."""
    t = x * x
    p = -5.70498872745e-3 * t + 2.06390887954e-2
    p = p * t - 5.37397155531e-2
    p = p * t + 1.33314422036e-1
    p = p * t - 3.33332819422e-1
    near = p * t * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def slope_of_tanh(u):
    """1 - tanh(u)^2, which cancels where tanh is almost 1."""
    e = tl.exp(-2.0 * tl.abs(u))
    r = 1.0 / (1.0 + e)
    return 4.0 * e * r * r


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_keys(seed_ptr, rows):
    """The two keys of each row (int64); slimkernels/ops/_dropout.py has the definition."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    mixed = _mix(_mix(low) ^ high ^ rows.to(tl.uint32))
    key0 = _mix(mixed ^ (rows >> 32).to(tl.uint32))
    return key0, _mix(key0 ^ low)


@triton.jit
def keep_mask(key0, key1, cols, threshold):
    """Which elements survive dropout; keys of rows and columns in shapes that broadcast.

    threshold is a run-time uint32 (backends/_dropout.py): one compiled kernel serves every rate.
    """
    x = cols.to(tl.uint32) * 0x9E3779B9 + key0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + key1) * 0x846CA68B
    return (x ^ (x >> 16)) >= threshold.to(tl.uint32)
