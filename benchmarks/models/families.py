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
import itertools
import sys
from pathlib import Path

import torch

from benchmarks import harness, provenance, report, results, timing
from benchmarks.models import family_models, measuring
from benchmarks.models.bert_memory import in_own_process
from benchmarks.models.family_models import FAMILIES, WORK

PROVIDERS = ["sdpa", "eager", "compiled", "slim"]
COLUMNS = ["family", "work", "provider", "ratio", "cpu_ratio", "ms", "cpu_ms", "peak_mib", "gate"]
PAGE = Path("docs/families.md")


def main(argv: list[str] | None = None) -> int:
    """0 if every family passed the gate, 1 if one failed, 2 on bad arguments."""
    options = parse(argv)
    device = torch.device(options.device)
    path = measuring.result_path(options, device, "families")
    if options.page:
        results.write_text(PAGE, page(*results.read_csv(path)))
        return 0
    facts = {
        "transformers": provenance.version_of("transformers"),
        "allocator": measuring.set_up(options, device),
        "protocol": "random weights, float32; providers take turns; ratio = median over the turns "
        "of sdpa's time over the provider's, eager's where there is no sdpa",
    }
    cases = list(itertools.product(options.family or FAMILIES, options.work or WORK))
    kept = _kept(path, cases) if options.renew and path.exists() else []
    today = provenance.provenance(device)
    when = {name: today[name] for name in ("commit", "date")}
    parts = ([r | when for r in measure(name, work, options, device)] for name, work in cases)
    return measuring.run(path, device, facts, COLUMNS, parts, kept)


def _kept(path: Path, cases: list[tuple[str, str]]) -> list[dict]:
    """The rows of an earlier run that are not measured again; each says when it was."""
    header, rows = results.read_csv(path)
    old = {name: header[name] for name in ("commit", "date")}
    return [old | row for row in rows if (row["family"], row["work"]) not in cases]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.models.families")
    measuring.add_options(parser, seconds=10.0, what="a family's work")
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    parser.add_argument("--work", action="append", choices=list(WORK))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--renew", action="store_true", help="keep the other rows of the file")
    parser.add_argument("--page", action="store_true", help=f"only write {PAGE} from the results")
    return measuring.parse_with_device(parser, argv)


def measure(name: str, work: str, options, device: torch.device) -> list[dict]:
    """A row for each provider; one that cannot run, or failed the gate, has no number."""
    verdict, swapped, left = family_models.gate(name, options.quick, device)
    providers = _providers(name, options, device)
    steps, notes = _steps(name, work, providers, verdict, options, device)
    budget = timing.Budget(options.seconds, least=3, most=50, warm_up=1)
    samples = {p: parts["step"] for p, parts in timing.interleave(steps, budget).items()}
    rows = []
    for provider in providers:
        row = {"family": name, "work": work, "provider": provider}
        row["gate"] = notes.get(provider, "baseline" if provider == providers[0] else "not run")
        if provider in samples:
            row |= measuring.numbers(samples[provider], samples[providers[0]], device)
            if not options.no_memory and provider != "compiled":
                arguments = name, work, provider, options.quick, str(device)
                row["peak_mib"] = in_own_process(family_models.run_twice, arguments, device)
        if provider == "slim":
            row |= {"swapped": swapped, "left": left}
        rows.append(row)
    return rows


def _providers(name: str, options, device: torch.device) -> list[str]:
    missing = set() if family_models.has_sdpa(name) else {"sdpa"}
    if options.no_compile or not harness.can_compile(device):
        missing.add("compiled")
    return [provider for provider in PROVIDERS if provider not in missing]


def _steps(name, work, providers, verdict, options, device) -> tuple[dict, dict[str, str]]:
    """What is timed of each provider that runs, and what is said of each that is no baseline."""
    steps, notes = {}, {"slim": verdict}
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
        steps[provider] = measuring.timed(step, clock)
    return steps, notes


def page(header: dict[str, str], rows: list[dict[str, str]]) -> str:
    """docs/families.md: a line a family."""
    of = {(r["family"], r["work"], r["provider"]): r for r in rows}
    head = ["family", *(f"{work}: {p}" for work in WORK for p in ("eager", "compiled", "slim"))]
    head += ["memory, sdpa to slim (MiB)", "swapped", "left, apart from containers"]
    cells = []
    for name in (name for name in FAMILIES if any(r["family"] == name for r in rows)):
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
