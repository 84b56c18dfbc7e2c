"""A BERT pretraining step against Hugging Face's: python -m benchmarks.models.bert_training

Forward with MLM and NSP losses, backward and fused AdamW, dropout 0.1, of one model in several
hands: the same weights, batch, masked positions and allocator, by turns in one process. Ratios are
over Hugging Face's BertForPreTraining with sdpa. Peak memory is that of a process of its own.
Results go to benchmarks/results/<device>/bert_training.csv. --default-allocator measures what a
program has that sets nothing, into bert_training_default_allocator.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from benchmarks import harness, provenance, timing
from benchmarks.models import bert_providers, measuring
from benchmarks.models.bert_memory import peak_memory
from benchmarks.models.bert_providers import PRECISIONS, Shape

SHAPES = {
    "cpu": [Shape("minilm", 8, 128), Shape("minilm", 8, 128, True), Shape("minilm", 4, 512)],
    "cuda": [
        Shape("base", 64, 128),
        Shape("base", 64, 128, True),
        Shape("base", 16, 512),
        Shape("minilm", 64, 128),
    ],
}
FULL = {"cpu": [Shape("base", 8, 128)], "cuda": [Shape("base", 64, 512, True)]}
QUICK = [Shape("tiny", 4, 64), Shape("tiny", 4, 64, True)]
BASELINE = "hf_sdpa"
PROVIDERS = [BASELINE, "hf_compiled", "slim", "slim_padded", "slim_torch"]
COLUMNS = ["shape", "dtype", "provider", "ratio", "cpu_ratio", "ms", "p20_ms", "p80_ms", "cpu_ms"]
COLUMNS += ["tokens_per_s", "peak_mib", "loss", "gate"]


def main(argv: list[str] | None = None) -> int:
    """0 if every provider passed the gate, 1 if one failed, 2 on bad arguments."""
    options = parse(argv)
    device = torch.device(options.device)
    facts = {
        "transformers": provenance.version_of("transformers"),
        "allocator": _allocator(options, device),
        "protocol": "a step is forward (MLM + NSP), backward, fused AdamW; dropout 0.1; providers "
        "take turns; ratio = median over the turns of hf_sdpa's time over the provider's; "
        "bfloat16 is autocast over float32 weights; tokens are real ones, padding not counted",
    }
    name = f"bert_training{'_default_allocator' * options.default_allocator}"
    path = measuring.result_path(options, device, name)
    return measuring.run(path, device, facts, COLUMNS, _parts(options, device))


def _parts(options, device: torch.device) -> Iterator[list[dict]]:
    shapes = QUICK if options.quick else SHAPES[device.type]
    shapes = shapes + (FULL[device.type] if options.full else [])
    for number, shape in enumerate(shapes):
        verdicts = bert_providers.gate(shape, device, PROVIDERS)
        print(f"{shape}: gate {verdicts}", flush=True)
        for dtype in options.dtype or list(PRECISIONS):
            names = _names(options, device, first=number == 0)
            yield measure(shape, dtype, names, verdicts, options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.models.bert_training")
    measuring.add_options(parser, seconds=10.0, what="a shape and dtype")
    parser.add_argument("--dtype", action="append", choices=list(PRECISIONS))
    parser.add_argument("--full", action="store_true", help="also the largest shape")
    parser.add_argument("--compile", choices=("first", "all", "none"), default="first")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="time glibc's malloc as it comes, page faults included, into a file of its own",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    return measuring.parse_with_device(parser, argv)


def _allocator(options, device: torch.device) -> str:
    """Set it up; the sentence for the header."""
    if device.type == "cpu" and options.default_allocator:
        if options.threads:
            torch.set_num_threads(options.threads)
        return "the C library's default, for all providers alike; peak memory under mallopt"
    return measuring.set_up(options, device)


def _names(options, device: torch.device, first: bool) -> list[str]:
    """torch.compile takes longer to build than everything else to measure: once, by default."""
    wanted = options.compile == "all" or (options.compile == "first" and first)
    if wanted and harness.can_compile(device):
        return PROVIDERS
    return [name for name in PROVIDERS if name != "hf_compiled"]


def measure(shape: Shape, dtype: str, names: list[str], verdicts, options) -> list[dict]:
    """A row for each provider; one that failed the gate has no number."""
    device = torch.device(options.device)
    batch = bert_providers.batch_of(shape, device)
    timed = [name for name in names if not verdicts[name].startswith("FAIL")]
    torch._dynamo.reset()
    made = bert_providers.providers(timed, shape, PRECISIONS[dtype], batch)
    verdicts = verdicts | {p.name: verdict for p in made if (verdict := _cannot_run(p))}
    made = [p for p in made if not verdicts[p.name].startswith("FAIL")]
    first_loss = {p.name: p.first_loss for p in made}
    clock = timing.Stopwatch(device)
    runs = {p.name: measuring.timed(p.step, clock) for p in made}
    budget = timing.Budget(options.seconds, least=3, most=50, warm_up=1)
    samples = {name: parts["step"] for name, parts in timing.interleave(runs, budget).items()}
    del made, runs
    rows = []
    for name in names:
        labels = {"shape": str(shape), "dtype": dtype, "provider": name, "gate": verdicts[name]}
        note = {"note": bert_providers.NOTES[name]}
        if name not in samples:
            rows.append(labels | note)
            continue
        numbers = measuring.numbers(samples[name], samples[BASELINE], device)
        numbers["tokens_per_s"] = 1e3 * batch.num_tokens / numbers["ms"]
        numbers |= {"real_tokens": batch.num_tokens, "loss": first_loss[name]}
        if not options.no_memory and name != "hf_compiled":
            numbers["peak_mib"] = peak_memory(name, shape, dtype, device)
        rows.append(labels | numbers | note)
    return rows


def _cannot_run(provider) -> str | None:
    """Note its loss before training and take one step; why it cannot, for the provider's row."""
    try:
        if provider.name != "hf_compiled":  # evaluation would be another graph to build
            provider.first_loss = provider.loss_without_dropout()
        provider.step()
    except RuntimeError as error:  # out of memory, or torch.compile cannot build
        return f"FAIL could not run: {' '.join(str(error).split())[:200]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
