"""Peak memory and time of a language model's loss, fused with its head and not.

    python -m benchmarks.loss_memory --tokens 8192 --vocabulary 131072 --width 256

Results go to runs/benchmarks/<device>/loss_memory.csv. Each provider runs forward and backward
once, in a process of its own. Memory is on a CPU the growth of resident memory over that of the
inputs, on a GPU what torch allocated on top of them; time is of the wall and, which other processes
disturb less, of this process on all cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import slimkernels as sk
from benchmarks import provenance, results

DTYPES = ["bfloat16", "float32"]
PROVIDERS = {
    "eager": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
    "slimkernels unfused": lambda x, w, t: sk.cross_entropy(sk.linear(x, w), t),
    "linear_cross_entropy": sk.linear_cross_entropy,
}


def measured(name: str, dtype: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """MiB, seconds of the wall, seconds of the processor."""
    device = _device()
    dtype = getattr(torch, dtype)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, options.width, device=device, dtype=dtype)
    w = torch.randn(options.vocabulary, options.width, device=device, dtype=dtype)
    w /= options.width**0.5
    target = torch.randint(options.vocabulary, (options.tokens,), device=device)
    (w @ x[:8].t()).sum().item()  # starts the library of products
    before = _peak(device, reset=True)
    wall, cpu = time.perf_counter(), time.process_time()
    PROVIDERS[name](x.requires_grad_(), w.requires_grad_(), target).backward()
    peak = _peak(device)
    return (peak - before) / 2**20, time.perf_counter() - wall, time.process_time() - cpu


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _peak(device: torch.device, reset: bool = False) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="both unless given")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    options = parser.parse_args()
    folder = options.out or Path("runs/benchmarks") / provenance.device_slug(_device())
    path, rows = folder / "loss_memory.csv", []
    print(f"Measuring a loss over {options.vocabulary} classes -> {path}")
    header = provenance.provenance(_device(), "python -m benchmarks.loss_memory")
    for dtype in options.dtype or DTYPES:
        for name in PROVIDERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                mib, wall, cpu = pool.apply(measured, (name, dtype, options))
            print(f"{dtype:<10}{name:<22}{mib:>7.0f} MiB{wall:>9.2f} s wall{cpu:>9.2f} s cpu")
            shape = f"{options.tokens}x{options.width}x{options.vocabulary}"
            case = {"shape": shape, "dtype": dtype, "provider": name}
            rows.append(case | {"ms": wall * 1e3, "cpu_ms": cpu * 1e3, "peak_mib": mib})
            results.write_csv(path, header, rows)


if __name__ == "__main__":
    main()
