"""Real tokens/s, padding avoided and MFU of a whole pretraining run, data included.

python -m benchmarks.models.pretraining runs ``slimkernels pretrain`` on the sample corpus, at BERT
base's size on a GPU, and reads the run's own log.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import provenance, results

SIZES = {
    "base": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "tokens_per_batch": 65536},
    "small": {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "tokens_per_batch": 2048},
    "quick": {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "tokens_per_batch": 256},
}


def main(argv: list[str] | None = None) -> int:
    """0 when the run finished, else the run's own code."""
    from slimkernels.scripts.pretrain import Options, pretrain

    options = parse(argv)
    device = torch.device(options.device)
    size = options.size or ("base" if device.type == "cuda" else "small")
    steps = 20 if size == "quick" else options.steps
    with tempfile.TemporaryDirectory() as folder:  # its checkpoints are no result
        code = pretrain(
            Options(
                out=Path(folder),
                device=options.device,
                steps=steps,
                checkpoint_every=steps,
                heldout_batches=4,
                lr=5e-4,
                **SIZES[size],
            )
        )
        logs = sorted(Path(folder).rglob("log.jsonl"))
        lines = [json.loads(line) for line in logs[0].read_text().splitlines()] if logs else []
    if code or not lines:
        return code or 1
    row = summary(lines) | {"size": size, "steps": steps}
    path = options.out / "pretraining.csv"
    results.write_csv(path, provenance.provenance(device), [row])
    print(f"{results.text_table([row], list(row))}\nwrote {path}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.models.pretraining")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    return parser.parse_args(argv)


def summary(lines: list[dict]) -> dict[str, object]:
    """Medians over the log's lines but the first, in which kernels were compiled."""
    timed = lines[1:] or lines
    row: dict[str, object] = {"mlm_loss_first": lines[0]["mlm_loss"]}
    row["mlm_loss_last"] = lines[-1]["mlm_loss"]
    for name in ("tokens_per_second", "padding_avoided", "waiting", "mfu"):
        values = [line[name] for line in timed if name in line]
        if values:
            row[name] = statistics.median(values)
    return row


if __name__ == "__main__":
    sys.exit(main())
