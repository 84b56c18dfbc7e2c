"""Random numbers that are a pure function of a seed and some counters, whatever was drawn before.

Each counter in turn steps a SplitMix64 generator (Steele, Lea, Flood 2014) whose state is the
output for the counters before it. Integer arithmetic only, so the same numbers on any machine and
with any numpy, whose own Generator methods may give other streams from one version to the next.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The first counter of every call: one seed serves all of them without correlation."""

    PAIRS = 0
    ORDER = 1
    MASKS = 2


_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def counter_bits(seed: int, stream: Stream, *counters) -> np.ndarray:
    """64 random bits for each element of the counters, broadcast against one another; uint64.

    seed      any int, of which the lowest 64 bits count
    counters  non-negative integers or integer arrays
    """
    bits = np.asarray([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    for counter in (stream, *counters):
        bits = _mix(bits + _GAMMA * (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)))
    return bits


def counter_uniform(seed: int, stream: Stream, *counters) -> np.ndarray:
    """float64 in [0, 1), from the upper 53 of counter_bits."""
    return (counter_bits(seed, stream, *counters) >> np.uint64(11)) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))
