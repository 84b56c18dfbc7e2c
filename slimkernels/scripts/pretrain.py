"""slimkernels pretrain: a BERT from scratch, with masked words and next sentences.

Devlin et al. 2019, on text of your own or on the sample that comes with the package: builds a
tokenizer, packs sentence pairs into batches without padding, trains, evaluates on held-out text,
and says what was learned and how a step compares with the library's reference in plain PyTorch.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tokenizers  # noqa: F401  data imports it when it is needed; if missing, it is said first
import torch
import tyro

from slimkernels.data import Tokenizer, sample_path
from slimkernels.data.pretraining import prepare
from slimkernels.dispatch import BackendError
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.training import checkpoint, resume, speed
from slimkernels.training.device import resolve_device, resolve_precision
from slimkernels.training.loop import Run, TrainingError, evaluate, save
from slimkernels.training.optim import adamw
from slimkernels.training.report import losses_text, report_results, train_with_progress
from slimkernels.training.runs import start_run, write_json


@dataclass
class Options:
    """Pretrain a BERT with masked-language-model and next-sentence losses."""

    corpus: Path | None = None
    """jsonl with a "text" a line (.gz, .xz, .zst), text files of one document each, or a folder of
    either; at least four documents; by default the sample in the package"""
    out: Path = Path("runs/pretrain")
    """where numbered run folders go"""
    resume: bool = False
    """go on with the newest run under --out; that run's own options hold, but for --device"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of matrix products; auto is bfloat16 on a GPU and float32 on a CPU"""
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 8192
    max_length: int = 128
    """tokens in a sentence pair, special ones among them"""
    tokens_per_batch: int = 2048
    """real tokens in a step"""
    steps: int = 500
    lr: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    seed: int = 0
    heldout_batches: int = 16
    """batches of held-out text in an evaluation"""
    checkpoint_every: int = 100
    """steps between checkpoints"""
    compare_steps: int = 5
    """steps timed at the end, on our kernels and on their reference in PyTorch; 0: none"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when it finished, 1 on bad input, 130 when interrupted."""
    options, saved = _parse(argv, Options()), None
    try:
        if options.resume:
            saved = resume.newest(options)
            options = resume.own_options(saved, _parse(argv, saved.options))
        return pretrain(options, saved)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError, BackendError, checkpoint.CheckpointError, TrainingError) as error:
        print(f"slimkernels pretrain: {error}", file=sys.stderr)
        return 1


def pretrain(options: Options, saved: resume.Saved | None = None) -> int:
    """Prepare, train, evaluate and report one run; a new one unless `saved` says where to go on."""
    run, tokenizer, heldout = _set_up(options, saved)
    folder, before = run.checkpoints, run.trainer["heldout_at_start"]
    print(f"Held-out loss before training: {losses_text(before)}.")

    if not train_with_progress(run, folder):
        print(f"Interrupted at step {run.step}; the checkpoint is in {folder}.")
        print(f"Go on with: slimkernels pretrain --resume --out {options.out}")
        return 130
    after = evaluate(run.model, heldout, run.device, run.precision)
    checkpoint.save_model(folder / "model.safetensors", run.model)
    report_results(run, folder, before, after, tokenizer)
    if options.compare_steps:
        print(speed.compare(run, options.compare_steps))
    return 0


def _parse(argv: list[str] | None, defaults: Options) -> Options:
    return tyro.cli(Options, args=argv, prog="slimkernels pretrain", default=defaults)


def _set_up(options: Options, saved: resume.Saved | None):
    """The run at its start, or at the checkpoint `saved`; its tokenizer, its held-out batches."""
    _check(options)
    _config(options, options.vocab_size)  # refuses bad sizes before the corpus is read
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    print(f"Device {device}; matrix products in {precision}.")
    data = prepare(
        options.corpus or sample_path(),
        Tokenizer.load(saved.checkpoint.parent) if saved else None,
        vocab_size=options.vocab_size,
        max_length=options.max_length,
        tokens_per_batch=options.tokens_per_batch,
        seed=options.seed,
        say=lambda sentence: print(sentence, flush=True),
    )
    heldout = [data.heldout[i] for i in range(min(options.heldout_batches, len(data.heldout)))]
    torch.manual_seed(options.seed)
    model = BertForPreTraining(_config(options, data.tokenizer.vocab_size)).to(device)
    run = Run(
        model=model,
        optimizer=adamw(model, options.lr, weight_decay=options.weight_decay),
        batches=data.training,
        device=device,
        precision=precision,
        total_steps=options.steps,
        peak_lr=options.lr,
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        # The folder comes last: all that can be refused has been.
        checkpoints=saved.checkpoint.parent if saved else start_run(options.out),
        checkpoint_every=options.checkpoint_every,
    )
    print(f"Run folder {run.checkpoints}.")
    if saved:
        resume.go_on(run, saved)
    else:
        _start(run, options, data.tokenizer, heldout)
    return run, data.tokenizer, heldout


def _start(run: Run, options: Options, tokenizer: Tokenizer, heldout: list) -> None:
    """Write what a new run begins with, its first checkpoint last."""
    config = run.model.config.to_dict()
    stored = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    before = evaluate(run.model, heldout, run.device, run.precision)
    run.trainer = {"options": stored, "config": config, "heldout_at_start": before}
    write_json(run.checkpoints / "config.json", config)
    tokenizer.save(run.checkpoints)
    save(run)


# The least that each option may be; those of the model's sizes are TransformerConfig's to check.
AT_LEAST = {
    "vocab_size": 64,
    "max_length": 8,
    "steps": 1,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "heldout_batches": 1,
    "checkpoint_every": 1,
    "compare_steps": 0,
}


def _check(options: Options) -> None:
    """ValueError naming the option that makes no sense, as the user typed it."""
    for name in (*AT_LEAST, "lr", "max_grad_norm"):
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if name not in AT_LEAST and not 0 < value < math.inf:
            raise ValueError(f"{option} must be positive; got {value}")
        if name in AT_LEAST and not AT_LEAST[name] <= value < math.inf:
            raise ValueError(f"{option} must be at least {AT_LEAST[name]}; got {value}")


def _config(options: Options, vocab_size: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        intermediate_size=4 * options.hidden_size,
        max_positions=options.max_length,
        dropout_p=options.dropout,
        attention_dropout_p=options.dropout,
    )
