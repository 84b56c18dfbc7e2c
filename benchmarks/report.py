"""docs/performance.md from benchmarks/results: python -m benchmarks.report

Every number comes from a result file; nothing is typed, and rows that lose stay in. Where README.md
has the two markers below, the table of whole models between them is renewed too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.results import read_csv, write_text

BEGIN, END = "<!-- performance begins -->", "<!-- performance ends -->"
FACTS = ("device", "cpu", "driver", "threads", "torch", "triton", "transformers", "slimkernels")
FACTS += ("commit", "date", "load average", "allocator", "attention tiles")
FACTS += ("copy bandwidth", "matrix products")
FACTS += ("protocol", "command")
CASE = ("shape", "dtype", "variant", "part")
WAITED_FOR = ("inference", "both", "step")  # of an op, and of an optimizer
BACKENDS = ("triton", "cuda", "cpu")
NOISE = 0.02
Row = dict[str, str]


def main(argv: list[str] | None = None) -> int:
    """0; with --check 1 if a file is not what the results say."""
    parser = argparse.ArgumentParser("python -m benchmarks.report")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    wanted = {options.page: page(options.results)}
    if options.readme.exists() and BEGIN in options.readme.read_text():
        wanted[options.readme] = renewed(options.readme.read_text(), options.results)
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text() != text]
    for path in stale:
        if not options.check:
            write_text(path, wanted[path])
        print(f"{path.name}: {'is out of date' if options.check else 'written'}")
    return 1 if options.check and stale else 0


def page(folder: Path) -> str:
    """The whole of docs/performance.md."""
    lines = [
        "# Performance",
        "",
        "Made from benchmarks/results by `python -m benchmarks.report`; benchmarks/README.md says",
        "how the numbers were taken and how to repeat them. A ratio is speed over eager PyTorch,",
        "or over Hugging Face with sdpa for whole models: above 1 is faster, below 1 slower. A",
        "second ratio, after the stroke, is that of process CPU time. A backend that delegates to",
        "eager says why; a provider that fails the correctness gate has no number.",
    ]
    for device in sorted(path for path in folder.glob("*") if any(path.glob("*.csv"))):
        lines += ["", *device_section(device)]
    return "\n".join(lines) + "\n"


def device_section(folder: Path) -> Iterator[str]:
    tables = {path.stem: read_csv(path) for path in sorted(folder.glob("*.csv"))}
    header = next(iter(tables.values()))[0]
    yield f"## {header.get('device', folder.name)}"
    if tables.pop("families", None):
        yield from ("", "Hugging Face's families, before and after: [families.md](families.md).")
    for name in (
        "bert_training",
        "bert_training_default_allocator",
        "pretraining",
        "encoder_inference",
        "loss_memory",
    ):
        if name in tables:
            yield from section(name.replace("_", " "), *tables.pop(name), model_table)
    ops = {name: rows for name, (_, rows) in tables.items() if "part" in rows[0]}
    if ops:
        yield from ("", "### Where eager is faster", "", *slower_table(ops))
    for name, (facts, rows) in tables.items():
        yield from section(name, facts, rows, op_table)


def section(title: str, facts: Row, rows: list[Row], table) -> Iterator[str]:
    yield from ("", f"### {title}", "")
    yield from table(rows)
    yield ""
    yield from ("<details><summary>provenance</summary>", "")
    yield from (f"- {name}: {facts[name]}" for name in FACTS if name in facts)
    if facts.get("complete", "yes") != "yes":
        yield f"- incomplete: {facts['complete'].removeprefix('no: ')} cases"
    yield from ("", "</details>")


def model_table(rows: list[Row]) -> list[str]:
    """One line a provider, all columns that have a number."""
    names = ["shape", "dtype", "provider", "ratio", "tokens_per_s", "ms", "peak_mib", "loss"]
    names += ["tokens_per_second", "padding_avoided", "waiting", "mfu", "size", "steps"]
    names += ["mlm_loss_first", "mlm_loss_last", "cosine", "gate"]
    names = [name for name in names if any(row.get(name) for row in rows)]
    cells = [
        [_ratio(row) if name == "ratio" else row.get(name, "") for name in names] for row in rows
    ]
    return markdown([name.replace("_", " ") for name in names], cells)


def slower_table(tables: dict[str, list[Row]]) -> Iterator[str]:
    """The rows of what slimkernels would run by itself that lose, halves of a step left out."""
    cells, cases = [], 0
    for name, rows in tables.items():
        runs: dict[tuple, Row] = {}
        for row in rows:
            if not row.get("ratio") or row["part"] not in WAITED_FOR:
                continue
            key = row["shape"], row["dtype"], row["variant"], row["part"]
            if row["provider"] == "torch" or row["provider"] in BACKENDS and key not in runs:
                runs[key] = row
        cases += len(runs)
        slower = [r for r in runs.values() if float(r["ratio"]) < 1 - NOISE]
        cells += [[name, *(r[c] for c in CASE), r["provider"], _ratio(r)] for r in slower]
    yield f"What runs by itself is slower than eager by more than {NOISE:.0%}, which two runs of"
    yield f"the same code differ by, in {len(cells)} of {cases} rows of inference, of forward with"
    yield "backward, and of optimizers' steps. `torch` is eager's own kernel, called through this"
    yield "library."
    yield from ("", *markdown(["op", *CASE, "provider", "ratio"], cells)) if cells else ()


def op_table(rows: list[Row]) -> list[str]:
    """One line a case and part: eager's time, then each provider's ratio and share of the roof."""
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "eager"]
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = (row["shape"], row["dtype"], row["variant"], row["part"])
        cases.setdefault(key, {})[row["provider"]] = row
    cells = []
    for key, by_provider in cases.items():
        eager = by_provider.get("eager", {})
        if not eager:
            continue
        # A refusal or a red gate has one row, at both; it holds for the parts too.
        whole = cases.get((*key[:3], "both"), {})
        shown = [_cell(by_provider.get(name) or whole.get(name)) for name in providers]
        cells.append([*key, eager.get("ms", ""), _share(eager), *shown])
    notes = list(dict.fromkeys(f"{r['provider']}: {r['note']}" for r in rows if r.get("note")))
    head = ["shape", "dtype", "variant", "part", "eager ms", "roof %", *providers]
    return [*markdown(head, cells), *(["", *(f"- {note}" for note in notes)] if notes else [])]


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["gate"].startswith("FAIL"):
        return "wrong: no number"
    if not row.get("ratio"):
        return row["note"].split(":")[0]
    return f"{_ratio(row)} ({_share(row)} %)"


def _ratio(row: Row) -> str:
    if not row.get("ratio"):
        return "wrong: no number" if row.get("gate", "").startswith("FAIL") else ""
    wall = f"{float(row['ratio']):.2f}"
    return f"{wall} / {float(row['cpu_ratio']):.2f}" if row.get("cpu_ratio") else wall


def _share(row: Row) -> str:
    return f"{float(row['percent_of_roof']):.0f}" if row.get("percent_of_roof") else ""


def markdown(head: list[str], cells: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells),
    ]


def renewed(readme: str, folder: Path) -> str:
    """README with the table of whole models between the markers made anew, one a device."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    lines = []
    for path in sorted(folder.glob("*/bert_training.csv")):
        facts, rows = read_csv(path)
        kept = [{k: v for k, v in row.items() if k not in ("gate", "loss")} for row in rows]
        lines += [f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}:", ""]
        lines += [*model_table(kept), ""]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"{END}{after}"


if __name__ == "__main__":
    sys.exit(main())
