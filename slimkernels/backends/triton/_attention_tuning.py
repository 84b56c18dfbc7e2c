"""Which tiles of attention are the fastest here: the search behind `slimkernels tune attention`.

One kernel at a time, by measuring: first the blocks and warps near those in use, then the winner's
stages. Only tiles whose numbers are right are timed. Candidates take turns on the clock and the
order rotates, so that a GPU that warms up slows all of them alike.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.backends.triton._attention_launch import Prepared
from slimkernels.backends.triton._attention_tiles import LEAST, Keys, trying
from slimkernels.backends.triton.scaled_dot_product_attention import (
    dbias_of,
    dkdv_of,
    dq_of,
    forward,
    sum_rows,
)

TURNS = 9
SLOW = 1.5  # a candidate this much slower than the best, in its first turn, gets no second
NOISE = 1.02  # what is less faster than this is as fast
_STAGES = 1, 2, 3, 4
_SAFE = [16, 16, 4, 1]  # fits every GPU: what prepares a kernel's inputs need not be fast


class Found(NamedTuple):
    """The result of a search."""

    entry: list[int] | None  # None if no candidate runs and is right
    speedup: float  # over the entry in use; 1 if that stays, or does not run here
    tried: int
    skipped: Counter[str]  # how many candidates, by the reason


def candidates(keys: Keys, before: list[int]) -> list[list[int]]:
    """`before`, and entries with blocks and warps up to twice and half as large."""
    M, N, warps, stages = before
    near = [(m, n, warps) for m in (M, M // 2, 2 * M) for n in (N, N // 2, 2 * N)]
    near += [(M, N, warps // 2), (M, N, 2 * warps)]
    near += [(2 * M, N, 2 * warps), (M, 2 * N, 2 * warps)]
    near += [(M // 2, N, warps // 2), (M, N // 2, warps // 2)]
    return [before] + [[*some, stages] for some in near[1:] if _fits(keys, *some)]


def _fits(keys: Keys, M: int, N: int, warps: int) -> bool:
    """Whether float32 sums and scores leave some of the 255 registers of a thread for the rest.

    What cannot fit would spill: slow to run, and slow to compile.
    """
    if min(M, N) < min(LEAST[:2]) or not 2 <= warps <= 16:
        return False
    kernel, width = keys[2], int(keys[3])
    held = {
        "forward": M * (width + N),
        "dq": M * (width + 2 * N),
        "dkdv": N * (2 * width + 2 * M),
        "dbias": 3 * M * N,
    }[kernel]
    return held <= 200 * 32 * warps


def most_candidates(keys: Keys, before: list[int]) -> int:
    """How many entries search() tries at most."""
    return len(candidates(keys, before)) + len(_STAGES) - 1


def search(
    keys: Keys,
    before: list[int],
    is_right: Callable[[], bool],
    run: Callable[[], object],
    clock: Callable[[Callable[[], object]], float],
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """The fastest right entry for one kernel.

    before    the entry in use, which stays unless another one is faster by more than noise
    is_right  runs the kernel on a small call and says whether its numbers are right
    run       runs it on a large call
    clock     runs that, and returns how many ms it took
    tick      called after each candidate
    """
    skipped: Counter[str] = Counter()
    usable: dict[tuple[int, ...], bool] = {}

    def runs(entry: list[int]) -> bool:
        if tuple(entry) not in usable:
            reason = _refusal(keys, entry, is_right)
            usable[tuple(entry)] = reason is None
            skipped.update([reason] if reason else [])
            tick()
        return usable[tuple(entry)]

    first = [entry for entry in candidates(keys, before) if runs(entry)]
    if not first:
        return Found(None, 1.0, len(usable), skipped)
    samples = _race(keys, first, before, run, clock)
    best = min(samples, key=lambda entry: statistics.median(samples[entry]))
    stages = [[*best[:3], n] for n in _STAGES]
    final = [entry for entry in (list(best), before, *stages) if runs(entry)]
    samples = _race(keys, final, before, run, clock)
    best = min(samples, key=lambda entry: statistics.median(samples[entry]))
    if tuple(before) not in samples:
        return Found(list(best), 1.0, len(usable), skipped)
    # By turns, not by medians: what disturbs a turn disturbs both.
    pairs = zip(samples[tuple(before)], samples[best], strict=True)
    speedup = statistics.median(old / new for old, new in pairs)
    if speedup < NOISE:
        return Found(before, 1.0, len(usable), skipped)
    return Found(list(best), speedup, len(usable), skipped)


def _refusal(keys: Keys, entry: list[int], is_right: Callable[[], bool]) -> str | None:
    """Why an entry cannot be used; None if it can."""
    try:
        with trying(keys, entry):
            return None if is_right() else "wrong numbers"
    except Exception as error:  # whatever Triton, LLVM or ptxas raise: it is counted and shown
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if the device itself has failed: the end of all
        return type(error).__name__


def _race(keys, entries, before, run, clock) -> dict[tuple[int, ...], list[float]]:
    """The times in ms of those that are not slow, one a turn."""
    samples: dict[tuple[int, ...], list[float]] = {tuple(entry): [] for entry in entries}
    for turn in range(TURNS + 1):
        order = list(samples)
        shift = turn % len(order)
        for entry in order[shift:] + order[:shift]:
            with trying(keys, list(entry)):
                samples[entry].append(clock(run))
        if turn == 0:  # warms up: for this size some may have been compiled again
            samples = {entry: [] for entry in samples}
        elif turn == 1:
            limit = SLOW * min(times[0] for times in samples.values())
            kept = {e: t for e, t in samples.items() if t[0] <= limit or e == tuple(before)}
            samples = kept
    return samples


class EventClock:
    """Times GPU work with CUDA events, after overwriting the L2: in a model inputs are not there.

    The overwriting also keeps the GPU busy while the host queues the launch.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.cold = torch.empty(max(4 * cache, 2**29), dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cold.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def launches(
    query: Tensor, key: Tensor, value: Tensor, dy: Tensor, call
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each kernel of one call by itself, with what it needs ready, in the tiles of the moment."""
    rich = "rich" if call.is_modified or call.dropout_p else "plain"
    width = str(max(query.shape[-1], 64))
    place = ("float" if query.dtype == torch.float32 else "half", rich)
    with trying((*place, "forward", width), _SAFE), trying((*place, "dq", width), _SAFE):
        output, lse = forward(query, key, value, call)
        given = Prepared(query, key, value, call, positive_scale=False)
        operands = given.operands(dy, output)
        statistics = given.statistics(lse, None)
        sum_rows(given, operands, statistics)

    def dq():
        if statistics.total is not None:  # float32's sums are computed in dq's tiles
            sum_rows(given, operands, statistics)
        return dq_of(given, operands, statistics, False)[:1]

    return {
        "forward": lambda: forward(query, key, value, call)[:1],
        "dq": dq,
        "dkdv": lambda: dkdv_of(given, operands, statistics),
        "dbias": lambda: (dbias_of(given, operands, statistics),),
    }
