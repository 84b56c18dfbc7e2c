"""What the benchmarks of whole models share: options, and measuring part after part into a file."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks import allocator, provenance, results, timing


def add_options(parser: argparse.ArgumentParser, seconds: float, what: str) -> None:
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"of timing {what}")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path)


def parse_with_device(parser: argparse.ArgumentParser, argv: list[str] | None):
    parser.add_argument("--device", choices=("cpu", "cuda"))
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def set_up(options: argparse.Namespace, device: torch.device) -> str:
    """Threads and allocator; the sentence about the latter for the header."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return allocator.keep_freed_memory() if device.type == "cpu" else "CUDA's caching allocator"


def result_path(options: argparse.Namespace, device: torch.device, name: str) -> Path:
    folder = "runs/benchmarks" if options.quick else "benchmarks/results"
    return (options.out or Path(folder) / provenance.device_slug(device)) / f"{name}.csv"


def run(
    path: Path,
    device: torch.device,
    facts: dict[str, str],
    columns: list[str],
    parts: Iterable[list[dict]],
    kept: Iterable[dict] = (),
) -> int:
    """Write the rows of each part as soon as it is measured, after those that are kept.

    Returns 1 if a row failed its gate, else 0.
    """
    header = provenance.provenance(device) | facts
    print(f"Measuring on {provenance.device_name(device)} -> {path}")
    print("".join(f"  {name}: {value}\n" for name, value in header.items()), end="", flush=True)
    rows, start = list(kept), time.perf_counter()
    for measured in parts:
        print(results.text_table(measured, columns), flush=True)
        rows += measured
        results.write_csv(path, header, rows)
    failures = sum(str(row["gate"]).startswith("FAIL") for row in rows)
    print(f"Wrote {path} in {time.perf_counter() - start:.0f} s; {failures} rows failed the gate.")
    return 1 if failures else 0


def timed(step: Callable[[], object], clock: timing.Stopwatch) -> Callable[[], dict]:
    """What timing.interleave calls to run `step` once."""

    def run_once():
        clock.start()
        step()
        return {"step": clock.stop()}

    return run_once


def numbers(
    mine: timing.Samples, base: timing.Samples, device: torch.device
) -> dict[str, float | None]:
    """A row's times, and its ratios over the baseline."""
    median, p20, p80 = timing.quantiles(mine.wall)
    is_cpu = device.type == "cpu"  # on a GPU the host's time says nothing of the step's
    return {
        "ratio": timing.speedup(base.wall, mine.wall),
        "cpu_ratio": timing.speedup(base.cpu, mine.cpu) if is_cpu else None,
        "ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "cpu_ms": timing.quantiles(mine.cpu)[0] if is_cpu else None,
        "turns": len(mine.wall),
    }
