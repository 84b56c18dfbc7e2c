"""Hugging Face's families before and after replace: python -m benchmarks.models.families

Of each family a model of random weights, 6 layers of width 384, on a padded batch whose mean length
is about a third of the longest: inference (no gradients) and a training step (forward with labels,
backward, fused AdamW, dropout as it comes). The same weights and batch for all, by turns in one
process; ratios are over sdpa, or over eager where a family has no sdpa. Peak memory is that of a
process of its own. Results go to benchmarks/results/<device>/families.csv, and from there by
--page to docs/families.md.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import torch

from benchmarks import allocator, harness, provenance, report, results, timing
from benchmarks.models import family_models
from benchmarks.models.bert_memory import in_own_process
from benchmarks.models.family_models import FAMILIES, WORK

PROVIDERS = ["sdpa", "eager", "compiled", "slim"]
COLUMNS = ["family", "work", "provider", "ratio", "cpu_ratio", "ms", "cpu_ms", "peak_mib", "gate"]
PAGE = Path("docs/families.md")


def main(argv: list[str] | None = None) -> int:
    """0 if every family passed the gate, 1 if one failed, 2 on bad arguments."""
    options = parse(argv)
    device = torch.device(options.device)
    folder = "runs/benchmarks" if options.quick else "benchmarks/results"
    path = (options.out or Path(folder) / provenance.device_slug(device)) / "families.csv"
    if options.page:
        header, rows = results.read_csv(path)
        results.write_text(PAGE, page(header, rows))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    memory = allocator.keep_freed_memory() if device.type == "cpu" else "CUDA's caching allocator"
    header = provenance.provenance(device) | {
        "transformers": provenance.version_of("transformers"),
        "allocator": memory,
        "protocol": "random weights, float32; providers take turns; ratio = median over the turns "
        "of sdpa's time over the provider's, eager's where there is no sdpa",
    }
    rows, start = [], time.perf_counter()
    for name in options.family or FAMILIES:
        for work in options.work or WORK:
            measured = measure(name, work, options, device)
            print(results.text_table(measured, COLUMNS), flush=True)
            rows += measured
            results.write_csv(path, header, rows)
    failures = sum(str(row["gate"]).startswith("FAIL") for row in rows)
    print(f"Wrote {path} in {time.perf_counter() - start:.0f} s; {failures} rows failed the gate.")
    return 1 if failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.models.families")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--work", action="append", choices=list(WORK))
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing a family's work")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--page", action="store_true", help=f"only write {PAGE} from the results")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return options


def measure(name: str, work: str, options, device: torch.device) -> list[dict]:
    """A row for each provider; one that cannot run, or failed the gate, has no number."""
    verdict, swapped, left = family_models.gate(name, options.quick, device)
    providers = [p for p in PROVIDERS if p != "compiled" or not options.no_compile]
    providers = [p for p in providers if p != "sdpa" or family_models.has_sdpa(name)]
    if not harness.can_compile(device):
        providers = [p for p in providers if p != "compiled"]
    runs, notes = {}, {"slim": f"{verdict}"}
    clock = timing.Stopwatch(device)
    torch._dynamo.reset()
    for provider in providers:
        if provider == "slim" and verdict.startswith("FAIL"):
            continue
        try:
            step = family_models.step(name, work, provider, options.quick, device)
            step()
        except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
            notes[provider] = f"could not run: {' '.join(str(error).split())[:160]}"
            continue
        runs[provider] = functools.partial(_timed, step, clock)
    budget = timing.Budget(options.seconds, least=3, most=50, warm_up=1)
    samples = {p: parts["step"] for p, parts in timing.interleave(runs, budget).items()}
    base = samples[providers[0]]
    rows = []
    for provider in providers:
        row = {"family": name, "work": work, "provider": provider}
        row["gate"] = notes.get(provider, "baseline" if provider == providers[0] else "not run")
        if provider in samples:
            mine = samples[provider]
            row |= {
                "ratio": timing.speedup(base.wall, mine.wall),
                "cpu_ratio": timing.speedup(base.cpu, mine.cpu) if device.type == "cpu" else None,
                "ms": timing.quantiles(mine.wall)[0],
                "cpu_ms": timing.quantiles(mine.cpu)[0] if device.type == "cpu" else None,
                "turns": len(mine.wall),
            }
            if not options.no_memory and provider != "compiled":
                arguments = name, work, provider, options.quick, str(device)
                row["peak_mib"] = in_own_process(family_models.run_twice, arguments, device)
        if provider == "slim":
            row |= {"swapped": swapped, "left": left}
        rows.append(row)
    return rows


def _timed(step, clock: timing.Stopwatch):
    clock.start()
    step()
    return {"step": clock.stop()}


def page(header: dict[str, str], rows: list[dict[str, str]]) -> str:
    """docs/families.md: a line a family."""
    of = {(r["family"], r["work"], r["provider"]): r for r in rows}
    head = ["family", *(f"{work}: {p}" for work in WORK for p in ("eager", "compiled", "slim"))]
    head += ["memory, sdpa to slim (MiB)", "swapped", "left, apart from containers"]
    cells = []
    for name in dict.fromkeys(r["family"] for r in rows):
        line = [name]
        for work in WORK:
            for provider in ("eager", "compiled", "slim"):
                ratio = of.get((name, work, provider), {}).get("ratio")
                line.append(f"{float(ratio):.2f}x" if ratio else "-")
        peaks = [of.get((name, WORK[-1], p), {}).get("peak_mib") for p in ("sdpa", "slim")]
        line.append(" to ".join(f"{float(p):.0f}" if p else "-" for p in peaks))
        ours = of.get((name, WORK[0], "slim")) or of.get((name, WORK[-1], "slim"), {})
        cells.append([*line, ours.get("swapped", ""), ours.get("left", "")])
    facts = [f"- {key}: {value}" for key, value in header.items()]
    intro = [
        "# Hugging Face's families",
        "",
        "Made by `python -m benchmarks.models.families --page` from the results of one device. A",
        "number is how many times faster than Hugging Face's sdpa (eager where a family has no",
        "sdpa): below 1 is slower.",
        "",
    ]
    return "\n".join([*intro, *facts, "", *report.markdown(head, cells), ""])


if __name__ == "__main__":
    sys.exit(main())
