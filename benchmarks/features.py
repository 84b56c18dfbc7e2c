"""What each backend's attention can do, for docs/attention.md: python -m benchmarks.features

A cell is what the backend's own unsupported() says of a small call with that feature. What can run
on a CPU is also run, forward and backward. CUDA tensors are torch's fakes, which have the device,
shapes and dtypes of real ones: all that unsupported() reads. So a GPU changes nothing on the page.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

import slimkernels as sk
from benchmarks.provenance import ROOT
from benchmarks.report import markdown
from benchmarks.results import write_text
from slimkernels.dispatch import OPS

BEGIN, END = "<!-- features begin -->", "<!-- features end -->"
BACKENDS = {"triton": "cuda:0", "cpu": "cpu", "torch": "cpu"}  # and where its tensors are
OP = OPS["scaled_dot_product_attention"]
Arguments = tuple[tuple[torch.Tensor, ...], dict]


def main(argv: list[str] | None = None) -> int:
    """0; with --check 1 if the page is not what the backends say."""
    parser = argparse.ArgumentParser("python -m benchmarks.features")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/attention.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    before = options.page.read_text()
    after = renewed(before)
    if after == before:
        return 0
    if not options.check:
        write_text(options.page, after)
    print(f"{options.page.name}: {'is out of date' if options.check else 'written'}")
    return 1 if options.check else 0


def renewed(page: str) -> str:
    """The page with the table between its markers made anew."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n" + "\n".join(table()) + f"\n{END}{rest.partition(END)[2]}"


def table() -> list[str]:
    verdicts = {backend: verdicts_of(backend) for backend in BACKENDS}
    notes: list[str] = []
    rows = []
    for feature in verdicts["torch"]:
        row = [feature]
        for backend in BACKENDS:
            reason = verdicts[backend][feature]
            if reason is not None and f"{backend}: {reason}" not in notes:
                notes.append(f"{backend}: {reason}")
            row.append(
                "yes" if reason is None else f"no ({notes.index(f'{backend}: {reason}') + 1})"
            )
        rows.append(row)
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return ["", *markdown(["", *BACKENDS], rows), "", *numbered, ""]


def verdicts_of(backend: str) -> dict[str, str | None]:
    """Of every feature why the backend refuses it, or None."""
    if BACKENDS[backend] != "cpu":
        # No gradients: autograd would look for the device, which may not be there.
        with FakeTensorMode(), torch.no_grad():
            calls = features(torch.device(BACKENDS[backend])).items()
            return {name: refusal(backend, *arguments) for name, arguments in calls}
    calls = features(torch.device("cpu")).items()
    verdicts = {name: refusal(backend, *arguments) for name, arguments in calls}
    for name, arguments in calls:
        if verdicts[name] is None:
            run(backend, *arguments)  # a "yes" that raises must not reach the page
    return verdicts


def refusal(backend: str, tensors, options) -> str | None:
    options = {name: value for name, value in options.items() if name != "return_lse"}
    return OP.unsupported(backend, *OP.arguments(*tensors, **options))


def run(backend: str, tensors, options) -> tuple[torch.Tensor, ...]:
    """The outputs, and then the gradients."""
    y = sk.scaled_dot_product_attention(*tensors, **options, backend=backend)
    outputs = y if isinstance(y, tuple) else (y,)
    variant = options.get("variant", sk.AttentionVariant())
    table = variant.relative_bias.table if variant.relative_bias else None
    inputs = [*tensors, options.get("attn_mask"), variant.sinks, table]
    inputs = [x for x in inputs if x is not None and x.requires_grad]
    return *outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])


# Scores and masks of one's own, which only Triton and PyTorch can call.
@triton.jit
def _leaky(score, batch, head, i, j, tensors):
    return tl.where(score > 0, score, 0.5 * score)


@triton.jit
def _slope(score, batch, head, i, j, tensors):
    return tl.where(score > 0, 1.0, 0.5)


@triton.jit
def _even(batch, head, i, j, tensors):
    return (i + j) % 2 == 0


def _torch_leaky(score, batch, head, i, j, tensors):
    return torch.where(score > 0, score, 0.5 * score)


LEAKY = sk.ScoreFunction(score=_leaky, derivative=_slope, torch_score=_torch_leaky)
EVEN = sk.ScoreFunction(mask=_even, torch_mask=lambda b, h, i, j, tensors: (i + j) % 2 == 0)


def features(device: torch.device) -> dict[str, Arguments]:
    """A small call of each, as the public function takes it; all of them want gradients."""

    def tensors(q=(2, 4, 16, 32), k=None, v=None, dtype=torch.float32):
        k = k or q
        return tuple(
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
            for shape in (q, k, v or k)
        )

    def random(*shape, **options):
        return torch.randn(shape, device=device, **options)

    def integers(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    def variant(**options):
        return tensors(), {"variant": sk.AttentionVariant(**options), "is_causal": True}

    def relative(**options):
        bias = sk.t5_relative_bias(random(8, 4, **options), max_distance=16)
        return variant(relative_bias=bias)

    mask = random(16, 16) > 0
    return {
        "no feature": (tensors(), {}),
        "causal": (tensors(), {"is_causal": True}),
        "causal_offset, one for all": variant(causal_offset=3),
        "causal_offset, one a sequence": variant(causal_offset=integers(3, -2)),
        "key lengths": (tensors(), {"key_lengths": integers(16, 5)}),
        "mask (bool)": (tensors(), {"attn_mask": mask}),
        "bias": (tensors(), {"attn_mask": random(1, 4, 16, 16)}),
        "bias, its gradient": (tensors(), {"attn_mask": random(4, 16, 16, requires_grad=True)}),
        "window": variant(window=(4, None)),
        "ALiBi": variant(alibi_slopes=random(4)),
        "softcap": variant(softcap=30.0),
        "sinks, and their gradient": variant(sinks=random(4, requires_grad=True)),
        "relative bias": relative(),
        "relative bias, its table's gradient": relative(requires_grad=True),
        "lse, and its gradient": (tensors(), {"return_lse": True}),
        "dropout": (tensors(), {"dropout_p": 0.1}),
        "grouped heads": (tensors(k=(2, 2, 16, 32)), {"enable_gqa": True}),
        "ragged": (tensors((16, 4, 32)), {"cu_seqlens": integers(0, 5, 16)}),
        "ragged, other lengths of keys": (
            tensors((16, 4, 32), (24, 4, 32)),
            {"cu_seqlens": (integers(0, 5, 16), integers(0, 20, 24))},
        ),
        "values as wide as they like": (tensors(v=(2, 4, 16, 48)), {}),
        "heads 512 wide": (tensors((1, 1, 16, 512)), {}),
        "heads 520 wide": (tensors((1, 1, 16, 520)), {}),
        "float32": (tensors(), {}),
        "bfloat16": (tensors(dtype=torch.bfloat16), {}),
        "float16": (tensors(dtype=torch.float16), {}),
        "float64": (tensors(dtype=torch.float64), {}),
        "a score function of your own": variant(score=LEAKY),
        "a mask function of your own": variant(score=EVEN),
        "decoding with a cache": (
            tensors((2, 4, 1, 32), (2, 4, 160, 32)),
            {
                "is_causal": True,
                "key_lengths": integers(160, 30),
                "variant": sk.AttentionVariant(causal_offset=integers(159, 29)),
            },
        ),
    }


if __name__ == "__main__":
    sys.exit(main())
