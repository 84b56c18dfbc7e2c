"""Measure ops against eager PyTorch and torch.compile: python -m benchmarks.run layer_norm

Results go to runs/benchmarks/<device>/<op>.csv, or with --all to benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import sys
import time
from pathlib import Path

import torch

from benchmarks import allocator, harness, ops, provenance, results, timing, updates

COLUMNS = ["op", "shape", "dtype", "variant", "part", "provider", "ratio", "cpu_ratio", "ms"]
COLUMNS += ["p20_ms", "p80_ms", "gb_per_s", "tflop_per_s", "percent_of_roof", "peak_mib", "gate"]
COLUMNS += ["note"]


def main(argv: list[str] | None = None) -> int:
    """0 if every provider passed its gate, 1 if one failed, 2 on bad arguments."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    kept = "CUDA's caching allocator"
    if options.device == "cpu":
        kept = allocator.keep_freed_memory()
    device = torch.device(options.device)
    out = options.out or _default_folder(options, device)
    names = op_names() if options.all else options.ops
    print(f"Measuring {', '.join(names)} on {provenance.device_name(device)}; results in {out}/")
    header = provenance.provenance(device) | {"allocator": kept, "protocol": protocol(options)}
    print("".join(f"  {name}: {value}\n" for name, value in header.items()), end="", flush=True)
    roofs = harness.Roofs(device)
    failures, start = 0, time.perf_counter()
    for name in names:
        failures += measure_op(name, options, device, roofs, header, out)
    print(f"\nMeasured {len(names)} ops in {time.perf_counter() - start:.0f} s.", end=" ")
    print(f"{failures} rows failed the gate and have no number." if failures else "All passed.")
    return 1 if failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.run", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="op", help=f"one of {', '.join(op_names())}")
    parser.add_argument("--all", action="store_true", help="every op")
    parser.add_argument("--dtype", action="append", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="two shapes an op, short turns")
    parser.add_argument("--seconds", type=float, help="of timing a case")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--plot", action="store_true", help="also draw a PNG (needs matplotlib)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    unknown = [name for name in options.ops if name not in op_names()]
    if unknown:
        parser.error(f"unknown op {unknown[0]}; the ops are {', '.join(op_names())}")
    if bool(options.ops) == options.all:
        parser.error("name ops, or give --all")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return options


def op_names() -> list[str]:
    return sorted(
        module.name.removeprefix("bench_")
        for module in pkgutil.iter_modules(ops.__path__)
        if module.name.startswith("bench_")
    )


def protocol(options: argparse.Namespace) -> str:
    budget = budget_of(options)
    return (
        f"providers take turns, {budget.least} to {budget.most} of them or {budget.seconds:g} s a "
        "case; median, p20, p80; ratio = median over the turns of eager's time over the provider's"
        + ("; L2 overwritten before each part" if options.device == "cuda" else "")
    )


def budget_of(options: argparse.Namespace) -> timing.Budget:
    seconds = options.seconds or (0.5 if options.quick else 3.0)
    return timing.Budget(seconds, least=5 if options.quick else 11, warm_up=2)


def _default_folder(options: argparse.Namespace, device: torch.device) -> Path:
    base = provenance.ROOT / "benchmarks/results" if options.all else Path("runs/benchmarks")
    folder = base / provenance.device_slug(device)
    cwd = Path.cwd()
    return folder.relative_to(cwd) if folder.is_absolute() and cwd in folder.parents else folder


def measure_op(name, options, device, roofs, header, out: Path) -> int:
    """Measure every case of an op, writing the file after each; how many rows failed."""
    benchmark = importlib.import_module(f"benchmarks.ops.bench_{name}").BENCHMARK
    wanted = [d for d in harness.DTYPES[device.type] if _chosen(d, options.dtype)]
    suite = updates if isinstance(benchmark, updates.UpdateBenchmark) else harness
    cases = suite.cases_of(benchmark, device, wanted, options.quick)
    path, rows = out / f"{name}.csv", []
    with progress(name, len(cases)) as advance:
        for done, case in enumerate(cases, 1):
            providers = list(suite.providers_of(case, compiled=not options.no_compile))
            rows += suite.measure(case, roofs, budget_of(options), providers)
            state = {"complete": "yes" if done == len(cases) else f"no: {done} of {len(cases)}"}
            results.write_csv(path, header | roofs.lines() | state, rows)
            advance(" ".join(case.labels().values()))
    shown = [row for row in rows if row["part"] in ("both", "step")]
    print(f"\n{results.text_table(shown, COLUMNS)}\nwrote {path}", flush=True)
    if options.plot:
        title = f"{name} on {provenance.device_name(device)}"
        print(results.plot(path.with_suffix(".png"), title, rows))
    return sum(str(row["gate"]).startswith("FAIL") for row in shown)


def _chosen(dtype: torch.dtype, names: list[str] | None) -> bool:
    return not names or str(dtype).removeprefix("torch.") in names


@contextlib.contextmanager
def progress(name: str, total: int):
    """A function to call after each case: a tqdm bar where there is one, else a line."""
    try:
        from tqdm import tqdm
    except ImportError:
        done = iter(range(1, total + 1))
        yield lambda what: print(f"  {next(done)}/{total} {what}", flush=True)
        return
    with tqdm(total=total, desc=name, unit="case") as bar:

        def advance(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        yield advance


if __name__ == "__main__":
    sys.exit(main())
