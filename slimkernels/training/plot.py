"""The loss curve of a run, where people would rather look."""

from __future__ import annotations

import json
from pathlib import Path


def losses(log: Path, out: Path) -> bool:
    """Draw both losses of a run's log over its steps; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("mlm_loss", "masked words"), ("nsp_loss", "next sentence")):
        axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)
    return True
