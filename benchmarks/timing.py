"""The timing protocol, in one place.

Interleaved  providers take turns, so that a clock that drifts or a neighbour that loads the machine
             slows all of them alike. Each turn's order is drawn anew: in one that only rotates, a
             provider always follows the same other, and finds its caches and its spinning threads.
Cold         on a GPU the L2 is overwritten before each measured part: a training step's tensors
             come from memory too. The overwriting also gives the host time to queue the work.
Clocks       CUDA events on a GPU; perf_counter on a CPU, with process CPU time beside it, which
             other programs on the machine disturb less.
Statistics   median, p20, p80; a ratio is the median of the turns' ratios, not the ratio of medians.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Samples:
    """What was measured of one part of one provider: one entry a turn, in ms."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, wall: float, cpu: float) -> None:
        self.wall.append(wall)
        self.cpu.append(cpu)


@dataclass(frozen=True)
class Budget:
    """How long to measure a case: until `seconds` are over, between `least` and `most` turns."""

    seconds: float = 3.0
    least: int = 7
    most: int = 100
    warm_up: int = 2


class Stopwatch:
    """Times a sequence of parts on one device: ``start()``, ``stop()`` around each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.cold = torch.empty(max(4 * cache, 2**28), dtype=torch.int8, device=device)

    def start(self) -> None:
        if self.cold is not None:
            self.cold.zero_()
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
        else:
            self.begin = time.perf_counter()
        self.cpu_begin = time.process_time()

    def stop(self) -> tuple[float, float]:
        """Wall and process CPU time since start(), in ms; waits for the device."""
        if self.cold is None:
            wall = 1e3 * (time.perf_counter() - self.begin)
            return wall, 1e3 * (time.process_time() - self.cpu_begin)
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        end.synchronize()
        return self.begin.elapsed_time(end), 1e3 * (time.process_time() - self.cpu_begin)


def interleave(
    providers: dict[str, Callable[[], dict[str, tuple[float, float]]]],
    budget: Budget,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Samples]]:
    """Samples of every provider and part, by turns.

    providers  name -> a function that runs once and returns {part: (wall ms, cpu ms)}
    tick       called after each turn of all providers
    """
    for run in providers.values():
        for _ in range(budget.warm_up):
            run()
    samples: dict[str, dict[str, Samples]] = {name: {} for name in providers}
    order, draw = list(providers), random.Random(0)
    deadline = time.perf_counter() + budget.seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(budget.most if providers else 0):
            if turn >= budget.least and time.perf_counter() > deadline:
                break
            draw.shuffle(order)
            for name in order:
                for part, (wall, cpu) in providers[name]().items():
                    samples[name].setdefault(part, Samples()).add(wall, cpu)
            tick()
    finally:
        if collecting:
            gc.enable()
    return samples


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


def speedup(baseline: list[float], values: list[float]) -> float:
    """How many times faster than the baseline, turn by turn: above 1 is faster."""
    return statistics.median(b / max(v, 1e-9) for b, v in zip(baseline, values, strict=True))


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of one large copy, bytes read plus bytes written: the roof of memory-bound ops."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.randint(0, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (1e6 * _median_ms(lambda: target.copy_(source), device))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product of random numbers: the roof of matrix-bound ops."""
    size = 8192 if device.type == "cuda" else 1536
    size = size if dtype.itemsize < 4 or device.type == "cpu" else size // 2
    a, b = torch.randn(2, size, size, device=device).to(dtype).unbind()
    return 2 * size**3 / (1e9 * _median_ms(lambda: torch.mm(a, b), device))


def _median_ms(function: Callable[[], object], device: torch.device) -> float:
    clock = Stopwatch(device)

    def run():
        clock.start()
        function()
        return {"": clock.stop()}

    samples = interleave({"roof": run}, Budget(seconds=0.5, least=5, most=30))
    return statistics.median(samples["roof"][""].wall)
