"""slimkernels doctor: what replace() would do to a Hugging Face model, and what that is worth here.

The model is loaded without a head, run forwards on a padded batch of random tokens as it is and
swapped, turn by turn, and left where it was: nothing is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from slimkernels.dispatch import Op
from slimkernels.integrations.replace import replace, restore
from slimkernels.models.files import is_hub_name
from slimkernels.ops._known_calls import nothing_known
from slimkernels.training.device import resolve_device, resolve_precision

# From a disk that has not been read before it takes a minute: imported when that has been said.
if importlib.util.find_spec("transformers") is None:
    raise ModuleNotFoundError("No module named 'transformers'", name="transformers")


@dataclass
class Options:
    """Say what slimkernels.replace would swap in a model, what would run where, and how fast."""

    model: tyro.conf.Positional[str]
    """a folder with config.json and weights, or a model's name on the Hugging Face Hub"""
    batch: int = 8
    """sequences in the batch"""
    length: int = 128
    """tokens of the longest sequence; the mean is about half of it"""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is the GPU where there is one"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto is bfloat16 on a GPU and float32 on a CPU"""
    seconds: float = 20.0
    """how long to measure, about; at least one forward of each"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when it finished, 1 where the model cannot be loaded or run, 130 when
    interrupted."""
    options = tyro.cli(Options, args=argv, prog="slimkernels doctor")
    try:
        return diagnose(options)
    except KeyboardInterrupt:
        print("\nInterrupted.")
        return 130
    except ValueError as error:
        print(f"slimkernels doctor: {error}", file=sys.stderr)
        return 1


def diagnose(options: Options) -> int:
    for name in ("batch", "length"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(options, name)}")
    device = resolve_device(options.device)
    where = "" if is_folder(options.model) else " from the Hugging Face Hub, or its cache here"
    with step(f"Loading transformers, and {options.model}{where}"):
        model = load(options.model).to(device, resolve_precision(options.precision, device)).eval()
    inputs = padded_batch(model, options.batch, options.length)
    with step("Looking for what can be swapped"):
        report = replace(model)
        restore(model)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"\n{options.model}: {millions:.1f} M parameters, {model.dtype} on {device}{threads}\n")
    print(report, end="\n\n")
    with torch.no_grad():
        error = compare(model, inputs)
        print()
        with step(f"Measuring for {options.seconds:g} s, and a forward of each at least"):
            seconds = measure(model, inputs, options.seconds)
    real = inputs["attention_mask"].sum().item() if "attention_mask" in inputs else None
    print(verdict(seconds, error, options, real))
    return 0


def is_folder(model: str) -> bool:
    """False for what may be a name on the Hub; a ValueError for what is neither."""
    exists = os.path.exists(model)
    if not os.path.isdir(model) and (exists or not is_hub_name(model)):
        reason = "is a file" if exists else "does not exist"
        raise ValueError(
            f"model must be a folder, or a name on the Hugging Face Hub; {model} {reason}"
        )
    return exists


def compare(model, inputs: dict[str, Tensor]) -> float:
    """The difference() of a forward as it is and one swapped, of which it shows the ops."""
    with step("A forward of the model as it is"):
        before = outputs_of(model, inputs)
    replace(model)
    compiles = ", whose kernels are compiled the first time" if model.device.type == "cuda" else ""
    with step(f"A forward of the model swapped{compiles}"), recorded() as chosen:
        after = outputs_of(model, inputs)
    restore(model)
    print("\nOps of a forward, and the backends that run them (slimkernels.explain says why):")
    for (op, backend), times in sorted(chosen.items()):
        print(f"  {op:<30}{backend:<8}{times:>4} times")
    return difference(before, after, inputs)


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Says what is about to be done, and then how long it took."""
    print(f"{what} ...", end="", flush=True)
    begin, end = time.perf_counter(), ""
    try:
        yield
        end = f" {time.perf_counter() - begin:.1f} s"
    finally:
        print(end, flush=True)


def load(name: str) -> Module:
    """The model without a head; a ValueError in a sentence if there is none by that name."""
    import transformers

    transformers.logging.set_verbosity_error()  # of heads that are left out
    if os.path.isdir(name):  # but of a download one wants to see how far it is
        transformers.logging.disable_progress_bar()
    try:
        return transformers.AutoModel.from_pretrained(name)
    except Exception as error:  # of a damaged file each format has its own
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{name!r} must be a folder with config.json and weights, or a name that the Hugging "
            f"Face Hub knows and can be asked for from here; transformers says: {reason}"
        ) from error


def padded_batch(model: Module, B: int, T: int) -> dict[str, Tensor]:
    """Random inputs (B, T) with an attention_mask of rows that end early; or random images."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        config = getattr(model.config, "vision_config", model.config)
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        images = torch.randn(B, config.num_channels, size, size, generator=generator)
        return {"pixel_values": images.to(model.device, model.dtype)}
    if model.main_input_name != "input_ids":
        raise ValueError(f"it measures models of tokens or images, not of {model.main_input_name}")
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or T
    if longest < T:
        raise ValueError(f"--length must be at most {longest}, which the model allows; got {T}")
    lengths = torch.randint(max(T // 8, 1), max(7 * T // 8, 1) + 1, (B,), generator=generator)
    lengths[0] = T
    mask = (torch.arange(T) < lengths[:, None]).long()
    padding = config.pad_token_id or 0
    ids = torch.randint(padding + 1, config.vocab_size, (B, T), generator=generator)
    inputs = {"input_ids": ids.where(mask.bool(), padding), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : max(T // 2, 1)]
    return {name: t.to(model.device) for name, t in inputs.items()}


def outputs_of(model, inputs: dict[str, Tensor]) -> Tensor:
    """(B, T, C): what a model without a head ends with."""
    return model(**inputs).last_hidden_state


@contextlib.contextmanager
def recorded() -> Iterator[Counter]:
    """Counts (op, backend) of every choice that is made inside the block."""
    chosen, select = Counter(), Op.select

    def record(self, *args, backend=None):
        name = select(self, *args, backend=backend)
        chosen[self.name, name] += 1
        return name

    Op.select = record
    try:
        with nothing_known():
            yield chosen
    finally:
        Op.select = select


def measure(model, inputs, seconds: float) -> dict[str, list[float]]:
    """Seconds of forwards "before" and "after", turn by turn so that both drift alike.

    No turn begins after `seconds`, but one there is.
    """
    times = {"before": [], "after": []}
    begin = time.perf_counter()
    shape = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left"
    with tqdm(total=seconds, desc="measuring", bar_format=shape, leave=False, disable=None) as bar:
        while not times["after"] or time.perf_counter() - begin < seconds:
            for change, name in ((restore, "before"), (replace, "after")):
                change(model)
                # Caches are the other one's, which a forward of a second does not feel.
                took = forward_seconds(model, inputs)
                is_short = took < min(1.0, seconds / 20)
                times[name].append(forward_seconds(model, inputs) if is_short else took)
            bar.update(min(time.perf_counter() - begin, seconds) - bar.n)
    restore(model)
    return times


def forward_seconds(model, inputs) -> float:
    """How long one forward takes."""
    synchronize(model.device)
    start = time.perf_counter()
    outputs_of(model, inputs)
    synchronize(model.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(before: Tensor, after: Tensor, inputs: dict[str, Tensor]) -> float:
    """The largest one between real tokens, as a share of the largest value."""
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == before.shape[:2] and "decoder_input_ids" not in inputs:
        before, after = before[mask.bool()], after[mask.bool()]
    before, after = before.double(), after.double()
    return ((before - after).abs().max() / before.abs().max()).item()


def verdict(
    seconds: dict[str, list[float]], error: float, options: Options, real: int | None
) -> str:
    before, after = (1e3 * statistics.median(seconds[name]) for name in ("before", "after"))
    if real is None:
        what = f"{options.batch} images"
    else:
        share = 1 - real / (options.batch * options.length)
        what = f"{options.batch} x {options.length} tokens, {share:.0%} of them padding"
    return (
        f"\nForward of {what}, median of {len(seconds['after'])}:\n"
        f"  before  {before:9.2f} ms\n"
        f"  after   {after:9.2f} ms   {before / after:.2f} times as fast\n"
        f"  the outputs of real tokens differ by {error:.1e} of the largest"
    )


if __name__ == "__main__":
    sys.exit(main())
