"""slimkernels pretrain: a BERT from scratch, with masked words and next sentences.

Devlin et al. 2019, on text of your own or on the sample that comes with the package: builds a
tokenizer, packs sentence pairs into batches without padding, trains, evaluates on held-out text,
and says what was learned and how much faster it went than in eager PyTorch.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import slimkernels
from slimkernels.data import (
    RaggedBatches,
    Tokenizer,
    pack_examples,
    read_documents,
    sample_path,
    split_documents,
)
from slimkernels.models.bert import BertForPreTraining
from slimkernels.models.config import TransformerConfig
from slimkernels.training import checkpoint, plot, speed
from slimkernels.training.loop import Run, TrainingError, evaluate, save, train
from slimkernels.training.optim import adamw
from slimkernels.training.runs import newest_run, start_run

MASKED_SENTENCES = (
    "the president of the united [MASK] .",
    "she had not [MASK] him since the morning .",
    "the captain stood on the [MASK] of the ship .",
    "i do not [MASK] what to say to you .",
)


@dataclass
class Options:
    """Pretrain a BERT with masked-language-model and next-sentence losses."""

    corpus: Path | None = None
    """jsonl (.gz, .xz, .zst), text, or a folder of them; the sample in the package by default"""
    out: Path = Path("runs/pretrain")
    """where numbered run folders go"""
    resume: bool = False
    """go on with the newest run under --out, whose own options hold"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """matrix products; auto is bfloat16 on a GPU and float32 on a CPU"""
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
    compare_steps: int = 5
    """steps timed at the end on our kernels and on eager PyTorch; 0 to leave it out"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when it finished, 1 on bad input, 130 when interrupted."""
    import tyro

    options = tyro.cli(Options, args=argv, prog="slimkernels pretrain")
    try:
        return pretrain(options)
    except (ValueError, slimkernels.BackendError, checkpoint.CheckpointError, TrainingError) as e:
        print(f"slimkernels pretrain: {e}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"slimkernels pretrain: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped before there was anything to save", file=sys.stderr)
        return 130


def pretrain(options: Options) -> int:
    """Prepare, train, evaluate and report one run."""
    options, folder, saved = _open_run(options)
    device, precision = _device(options.device), None
    precision = _precision(options.precision, device)
    torch.manual_seed(options.seed)
    print(f"Run folder {folder}; device {device}; matrix products in {_short(precision)}.")

    tokenizer, batches, heldout = _prepare(options, folder)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        intermediate_size=4 * options.hidden_size,
        max_positions=options.max_length,
        dropout_p=options.dropout,
        attention_dropout_p=options.dropout,
    )
    model = BertForPreTraining(config).to(device)
    optimizer = adamw(model, options.lr, weight_decay=options.weight_decay)
    run = Run(
        model=model,
        optimizer=optimizer,
        batches=batches,
        device=device,
        precision=precision,
        total_steps=options.steps,
        peak_lr=options.lr,
        warmup_steps=options.warmup_steps,
        max_grad_norm=options.max_grad_norm,
        checkpoints=folder,
        checkpoint_every=options.checkpoint_every,
        trainer={"options": _as_json(options), "config": config.to_dict()},
    )
    if saved is None:
        run.trainer["heldout_at_start"] = evaluate(model, heldout, device, precision)
        save(run)
    else:
        checkpoint.load(saved, model, optimizer)
        run.trainer = checkpoint.read_trainer(saved)
        run.step = run.trainer.pop("step")
        print(f"Resuming {saved} at step {run.step}.")
    before = run.trainer["heldout_at_start"]
    print(f"Held-out loss before training: {_losses(before)}.")

    finished = _train(run, folder, model)
    if not finished:
        print(f"Interrupted at step {run.step}; the checkpoint is in {folder}.")
        print(f"Go on with: slimkernels pretrain --resume --out {options.out}")
        return 130
    checkpoint.save_model(folder / "model.safetensors", model)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2))
    _report(run, folder, before, evaluate(model, heldout, device, precision), tokenizer)
    if options.compare_steps:
        print(speed.compare(run, options.compare_steps))
    return 0


def _open_run(options: Options) -> tuple[Options, Path, Path | None]:
    """The options that hold, the run's folder, and the checkpoint to go on from, if any."""
    if not options.resume:
        _check(options)
        return options, start_run(options.out), None
    folder = newest_run(options.out)
    saved = checkpoint.latest(folder) if folder else None
    if saved is None:
        raise ValueError(f"--resume: there is no run with a checkpoint under {options.out}")
    trainer = checkpoint.read_trainer(saved)
    try:
        stored = {**trainer["options"], "out": options.out, "device": options.device}
        stored["corpus"] = Path(stored["corpus"]) if stored["corpus"] else None
        return Options(**stored), folder, saved
    except (KeyError, TypeError) as error:
        raise ValueError(f"--resume: {saved} was written by another version: {error}") from error


def _check(options: Options) -> None:
    for name in ("steps", "tokens_per_batch", "num_layers", "heldout_batches", "checkpoint_every"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < options.lr < math.inf:
        raise ValueError(f"--lr must be positive; got {options.lr}")


def _as_json(options: Options) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _losses(heldout: dict[str, float]) -> str:
    return f"MLM {heldout['mlm_loss']:.3f} nats a word, NSP {heldout['nsp_loss']:.3f}"


def _prepare(options: Options, folder: Path):
    """The tokenizer, the training batches and the held-out ones."""
    corpus = options.corpus or sample_path()
    print(f"Reading {corpus} ...", flush=True)
    documents, heldout_documents = split_documents(read_documents(corpus))
    saved = folder / "tokenizer.json"
    if saved.exists():
        tokenizer = Tokenizer.load(saved)
    else:
        print(f"Training a tokenizer on {len(documents)} documents ...", flush=True)
        tokenizer = Tokenizer.train(documents, options.vocab_size)
        tokenizer.save(saved)

    def batches(texts, is_heldout):
        encoded = tokenizer.encode_documents(texts)
        examples = pack_examples(
            encoded, tokenizer, max_length=options.max_length, seed=options.seed
        )
        return RaggedBatches(
            examples,
            tokenizer,
            tokens_per_batch=options.tokens_per_batch,
            seed=options.seed,
            is_heldout=is_heldout,
        )

    training, heldout = batches(documents, False), batches(heldout_documents, True)
    count = min(options.heldout_batches, len(heldout))
    print(
        f"{len(training.examples)} sentence pairs in {len(training)} batches an epoch; held out: "
        f"{len(heldout_documents)} documents, of which {count} batches are evaluated on."
    )
    return tokenizer, training, [heldout[step] for step in range(count)]


def _train(run: Run, folder: Path, model) -> bool:
    """Train with a progress bar, and with a line in log.jsonl for each report."""
    parameters = sum(p.numel() for p in model.parameters())
    print(f"Training {parameters / 1e6:.1f} M parameters for {run.total_steps} steps ...")
    with (
        (folder / "log.jsonl").open("a") as log,
        tqdm(total=run.total_steps, initial=run.step, unit="step", dynamic_ncols=True) as bar,
    ):

        def report(step: int, measured: dict) -> None:
            log.write(json.dumps({"step": step, **measured}) + "\n")
            log.flush()
            shown = (
                f"loss {measured['mlm_loss']:.2f}+{measured['nsp_loss']:.2f}, "
                f"{measured['tokens_per_second']:,.0f} real tokens/s, "
                f"padding avoided {measured['padding_avoided']:.0%}"
            )
            if "mfu" in measured:
                shown += f", MFU {measured['mfu']:.1%}"
            bar.set_postfix_str(shown, refresh=False)
            bar.update(step - bar.n)

        return train(run, report)


def _report(run: Run, folder: Path, before: dict, after: dict, tokenizer: Tokenizer) -> None:
    """Say what was learned, and draw the loss if matplotlib is there."""
    fell = before["mlm_loss"] - after["mlm_loss"]
    print(f"Held-out loss after training:  {_losses(after)}: MLM fell by {fell:.2f} nats.")
    for sentence in MASKED_SENTENCES:
        words = ", ".join(
            f"{tokenizer.decode([token])} {probability:.0%}"
            for token, probability in _predictions(run, tokenizer, sentence)
        )
        print(f"  {sentence}  ->  {words}")
    results = {"heldout_at_start": before, "heldout_at_end": after, "steps": run.step}
    (folder / "results.json").write_text(json.dumps(results, indent=2))
    print(f"Model, tokenizer, log and results are in {folder}.")
    if plot.losses(folder / "log.jsonl", folder / "loss.png"):
        print(f"The loss curve is {folder / 'loss.png'}.")


@torch.no_grad()
def _predictions(run: Run, tokenizer: Tokenizer, sentence: str) -> list[tuple[int, float]]:
    """The three likeliest words for the mask, with their probabilities."""
    before, after = (tokenizer.encode(part) for part in sentence.split("[MASK]"))
    ids = [tokenizer.cls_id, *before, tokenizer.mask_id, *after, tokenizer.sep_id]
    run.model.eval()
    logits = run.model.predict_masked(torch.tensor(ids, device=run.device), len(before) + 1)
    top = logits.float().softmax(-1).topk(3)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
