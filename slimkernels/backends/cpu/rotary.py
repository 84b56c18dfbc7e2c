"""Rotary position embedding on the CPU: csrc/cpu/rotary.cpp."""

from array import array

import torch

from slimkernels.backends._rotary import unsupported_tables
from slimkernels.backends.cpu._common import DTYPES, _cpu, pointers, run, unsupported_tensor


# No size is left to torch. Hugging Face's eager code, its tables looked up beforehand, has 0.85 of
# our time forward and backward at 1x4x16x64, 1.16 at 2x4x64x64 and 4.3 at 1x32x2048x128 (float32,
# an Intel Xeon with AMX, two busy threads), but the definition, which torch would have to run, is
# 2.6 times slower than ours where that is the faster.
def unsupported(query, key, cos, sin, positions, offset, interleaved):
    return unsupported_tables(cos, sin) or unsupported_tensor(query)


def forward(query, key, cos, sin, positions, offset, interleaved):
    return _turn(query, key, cos, sin, positions, offset, interleaved, 1.0)


def backward(dquery, dkey, cos, sin, positions, offset, interleaved):
    return _turn(dquery, dkey, cos, sin, positions, offset, interleaved, -1.0)


def _turn(query, key, cos, sin, positions, offset, interleaved, sign):
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    cos, sin = (t.float().contiguous() for t in (cos, sin))
    positions = None if positions is None else positions.to(torch.int64)
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    problem = _problem(query, key, cos, positions, offset)
    run(
        _cpu.rotary,
        *pointers(query, key, *outputs, cos, sin, positions),
        *(problem.buffer_info()[0], int(interleaved), sign, DTYPES[query.dtype]),
    )
    return outputs


def _problem(query, key, cos, positions, offset):
    """struct Problem in csrc/cpu/rotary.cpp."""
    B, T, H, D = query.shape
    rows, half = cos.shape
    by_token = (0, 0)
    if positions is not None:
        by_token = positions.stride(0) if positions.shape[0] > 1 else 0, positions.stride(1)
    strides = *query.stride()[:3], *key.stride()[:3]
    return array("q", (B, T, D, half, rows, offset, *by_token, H, key.shape[2], *strides))
