"""What a pretraining run says of itself: its progress, its losses, and what it has learned."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm import tqdm

from slimkernels.data import Tokenizer
from slimkernels.training import plot
from slimkernels.training.loop import Run, train
from slimkernels.training.runs import cut_log, write_json

MASKED_SENTENCES = (
    "the president of the united [MASK] .",
    "she had not [MASK] him since the morning .",
    "the captain stood on the [MASK] of the ship .",
    "i do not [MASK] what to say to you .",
)


def train_with_progress(run: Run, folder: Path) -> bool:
    """Train with a progress bar, and with a line in log.jsonl for each report."""
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"Training {parameters / 1e6:.1f} M parameters for {run.total_steps} steps ...")
    cut_log(folder / "log.jsonl", run.step)
    with (
        (folder / "log.jsonl").open("a") as log,
        tqdm(total=run.total_steps, initial=run.step, unit="step", dynamic_ncols=True) as bar,
    ):

        def report(step: int, measured: dict) -> None:
            log.write(json.dumps({"step": step, **measured}) + "\n")
            log.flush()
            mfu = f", MFU {measured['mfu']:.1%}" if "mfu" in measured else ""
            bar.set_postfix_str(
                f"loss {measured['mlm_loss']:.2f}+{measured['nsp_loss']:.2f}, "
                f"{measured['tokens_per_second']:,.0f} real tokens/s, "
                f"padding avoided {measured['padding_avoided']:.0%}{mfu}",
                refresh=False,
            )
            bar.update(step - bar.n)

        return train(run, report)


def losses_text(heldout: dict[str, float]) -> str:
    """Both held-out losses, with their units."""
    return f"MLM {heldout['mlm_loss']:.3f} nats a word, NSP {heldout['nsp_loss']:.3f}"


def report_results(
    run: Run, folder: Path, before: dict[str, float], after: dict[str, float], tokenizer: Tokenizer
) -> None:
    """Say what was learned, write results.json, and draw the loss if matplotlib is there.

    before, after  held-out losses, as training.loop.evaluate returns them
    """
    # First of all: what follows is for the eye.
    results = {"heldout_at_start": before, "heldout_at_end": after, "steps": run.step}
    write_json(folder / "results.json", results)
    fell = before["mlm_loss"] - after["mlm_loss"]
    print(f"Held-out loss after training:  {losses_text(after)}: MLM fell by {fell:.2f} nats.")
    for sentence in MASKED_SENTENCES:
        print(f"  {sentence}  ->  {guesses(run, tokenizer, sentence)}")
    print(f"Model, tokenizer, log and results are in {folder}.")
    if plot.losses(folder / "log.jsonl", folder / "loss.png"):
        print(f"The loss curve is {folder / 'loss.png'}.")


def guesses(run: Run, tokenizer: Tokenizer, sentence: str) -> str:
    """The three likeliest words for the mask in `sentence`, with their probabilities."""
    ids = [tokenizer.cls_id, *tokenizer.encode(sentence), tokenizer.sep_id]
    longest = run.model.config.max_positions
    if len(ids) > longest:
        return f"left out: it has {len(ids)} tokens, and the model takes {longest}"
    run.model.eval()
    input_ids = torch.tensor(ids, device=run.device)
    logits = run.model.predict_masked(input_ids, ids.index(tokenizer.mask_id))
    top = logits.float().softmax(-1).topk(3)
    words = [tokenizer.decode([token]) for token in top.indices.tolist()]
    shares = zip(words, top.values.tolist(), strict=True)
    return ", ".join(f"{word} {share:.0%}" for word, share in shares)
