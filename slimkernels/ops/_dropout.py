"""The one definition of dropout's random bits, which every backend computes alike.

Element (row, col) of a call is kept if ``bits(seed, row, col) >= dropout_p * 2**32``: a pure
function of three numbers, so backward replays forward's mask from the seed alone, a tile needs
no bits of its neighbours, and every backend can be compared with the reference bit by bit.

A 64-bit seed and the row are mixed into two 32-bit keys, once a row; an element then costs two
multiplications. The mixer is the "lowbias32" finaliser of C. Wellons (Prospecting for Hash
Functions, 2018), with the second key added between its rounds so that two rows never walk the
same sequence. Philox, the usual choice, makes four words at a time, which a Triton tile can use
only by exchanging them between threads; one word of four thrown away costs four times as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slimkernels.backends._dropout import threshold

_WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 from torch's generator of `device`: no host synchronisation, replayed by
    checkpointing, governed by torch.manual_seed."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def keep_mask(seed: Tensor, rows: Tensor, cols: Tensor, dropout_p: float) -> Tensor:
    """Which elements survive: bool, the broadcast shape of `rows` and `cols` (int64)."""
    # Flipping the highest bit turns the order of unsigned words into that of signed ones.
    return (_bits(seed, rows, cols) ^ -(2**31)) >= threshold(dropout_p) - 2**31


def _bits(seed: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Uniform 32-bit words as int32, whose products wrap.

    In int64 they take three times as long on a CPU. This way the reference's dropout costs less
    than torch's own, so that use_backend("torch") is a fair eager baseline.
    """
    key0, key1 = (key.to(torch.int32) for key in _row_keys(seed, rows))
    x = cols.to(torch.int32) * (0x9E3779B9 - 2**32) + key0
    # >> copies the sign of an int32; the masks make it the shift of an unsigned word.
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = ((x ^ ((x >> 15) & 0x1FFFF)) + key1) * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _row_keys(seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Both keys of each row, in int64, since a row's number may pass 2^32."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    key0 = _mix(_mix(_mix(low) ^ high ^ (rows & _WORD)) ^ ((rows >> 32) & _WORD))
    return key0, _mix(key0 ^ low)


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def dropped(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """The definition of dropout: rows are counted through all dimensions but the last."""
    rows = torch.arange(math.prod(x.shape[:-1]), device=x.device).view(*x.shape[:-1], 1)
    keep = keep_mask(seed, rows, torch.arange(x.shape[-1], device=x.device), dropout_p)
    return torch.where(keep, x * (1 / (1 - dropout_p)), 0.0)
