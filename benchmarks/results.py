"""Result files: CSV with a provenance header, text tables, plots."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path


def write_csv(path: Path, header: dict[str, str], rows: list[dict[str, object]]) -> None:
    """Provenance as "# name: value" lines, then the rows. Atomic: a reader, or a run that is
    killed, never sees half a file."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    for name, value in header.items():
        text.write(f"# {name}: {' '.join(str(value).split())}\n")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The header and the rows of a result file."""
    lines = path.read_text().splitlines()
    header = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return header, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def _cell(value: object) -> object:
    """Four significant digits: more would promise what no timing holds."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return value
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def text_table(rows: list[dict[str, object]], columns: list[str]) -> str:
    """Aligned columns; one that is empty in every row is left out."""
    cells = [{name: str(_cell(row.get(name))) for name in columns} for row in rows]
    columns = [name for name in columns if any(row[name] for row in cells)]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in columns}
    lines = ["  ".join(name.ljust(widths[name]) for name in columns)]
    lines += ["  ".join(row[name].ljust(widths[name]) for name in columns) for row in cells]
    return "\n".join(line.rstrip() for line in lines)


def plot(path: Path, title: str, rows: list[dict[str, object]]) -> str:
    """Bars of the ratio over eager, one group a case; a sentence instead without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row.get("part") == "both" and row.get("ratio")]
    if not timed:
        return "no plot: nothing was timed"
    cases = list(dict.fromkeys(_case(row) for row in timed))
    providers = list(dict.fromkeys(str(row["provider"]) for row in timed))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.35 * len(cases) * len(providers)))
    height = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        ratios = {_case(row): row["ratio"] for row in timed if row["provider"] == provider}
        where = [place + index * height for place in range(len(cases))]
        axes.barh(where, [ratios.get(case, 0) for case in cases], height, label=provider)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times as fast as eager PyTorch, forward and backward")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
    return f"wrote {path}"


def _case(row: dict[str, object]) -> str:
    return " ".join(str(row[name]) for name in ("shape", "dtype", "variant") if row.get(name))
