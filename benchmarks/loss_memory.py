"""Peak memory and time of a language model's loss, fused with its head and not.

    python -m benchmarks.loss_memory --tokens 8192 --vocabulary 131072 --width 256 --dtype bfloat16

Each provider runs forward and backward once, in a process of its own. Memory is on a CPU the growth
of resident memory over that of the inputs, on a GPU what torch allocated on top of them; time is of
the wall and, which other processes disturb less, of this process on all cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import torch
import torch.nn.functional as F

import slimkernels as sk

PROVIDERS = {
    "eager": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
    "slimkernels unfused": lambda x, w, t: sk.cross_entropy(sk.linear(x, w), t),
    "linear_cross_entropy": sk.linear_cross_entropy,
}


def measured(name: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """MiB, seconds of the wall, seconds of the processor."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
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
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    for name in PROVIDERS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            mib, wall, cpu = pool.apply(measured, (name, options))
        print(f"{name:<22}{mib:>7.0f} MiB{wall:>9.2f} s wall{cpu:>9.2f} s cpu", flush=True)


if __name__ == "__main__":
    main()
