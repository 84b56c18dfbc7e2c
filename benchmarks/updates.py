"""Benchmarks of optimizers: one step over a set of parameters, against torch's own optimizers.

The protocol, the columns and the rule of no number for a wrong provider are those of harness.py. A
provider is a function that is given parameters with gradients and returns its step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.harness import BASELINE, NATIVE, Provider, Roofs
from slimkernels.ops._update import UPDATES
from slimkernels.testing import assert_no_worse

GATE_STEPS = 3


def bert_base() -> list[tuple]:
    """The shapes of BERT base's 199 parameters: 110 million elements."""
    C, inner = 768, 3072
    embedding = [(30522, C), (512, C), (2, C), (C,), (C,)]
    attention = [(C, C), (C,)] * 4 + [(C,), (C,)]
    return embedding + 12 * (attention + [(inner, C), (inner,), (C, inner), (C,), (C,), (C,)])


def matrices(shapes: list[tuple]) -> list[tuple]:
    return [shape for shape in shapes if len(shape) == 2 and shape[0] < 10000]


SETS: dict[str, Callable[[], list[tuple]]] = {
    "50 tensors of 64": lambda: [(64,)] * 50,
    "50 matrices 16x16": lambda: [(16, 16)] * 50,
    "a small transformer": lambda: [(256, 256)] * 24 + [(256,)] * 40 + [(1024, 256)] * 8,
    "a small transformer's matrices": lambda: [(256, 256)] * 24 + [(1024, 256)] * 8,
    "bert-base": bert_base,
    "bert-base matrices": lambda: matrices(bert_base()),
}

Step = Callable[[], object]
Maker = Callable[..., Step]  # maker(parameters, **variant)


@dataclass(frozen=True)
class UpdateBenchmark:
    """What is measured of one optimizer.

    op        its name among slimkernels' updates
    shapes    device type -> names of SETS, each in a tuple of one
    eager     what a user of plain PyTorch runs
    ours      the optimizer here, with backend=
    truth     torch's numbers in any dtype, float64 among them
    rivals    name -> the same by another implementation
    bytes     the least bytes an element that a step moves, ``f(itemsize, **variant)``
    """

    op: str
    shapes: dict[str, list[tuple]]
    eager: Maker
    ours: Maker
    truth: Maker
    bytes: Callable[..., float]
    rivals: dict[str, Maker] = field(default_factory=dict)
    variants: tuple[dict, ...] = ({},)

    def work(self, part: str, shape: tuple, itemsize: int, variant: dict) -> float:
        """Bytes of a step."""
        return sum(map(math.prod, SETS[shape[0]]())) * self.bytes(itemsize, **variant)


@dataclass(frozen=True)
class UpdateCase:
    """One set of parameters, dtype and variant of a benchmark on a device."""

    benchmark: UpdateBenchmark
    shape: tuple
    dtype: torch.dtype
    variant: dict
    device: torch.device

    def parameters(self, shape: tuple | None = None, dtype: torch.dtype | None = None):
        torch.manual_seed(0)
        params = []
        for size in SETS[(shape or self.shape)[0]]():
            # Drawn in the case's own dtype, so that float64 sees the same numbers.
            value, grad = torch.randn(2, *size, device=self.device).to(self.dtype)
            params.append(torch.nn.Parameter(value.to(dtype or self.dtype) * 0.02))
            params[-1].grad = grad.to(params[-1].dtype)
        return params

    def labels(self) -> dict[str, str]:
        return {
            "op": self.benchmark.op,
            "shape": self.shape[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "variant": " ".join(f"{name}={value}" for name, value in self.variant.items()),
        }


def cases_of(benchmark, device, dtypes, quick: bool) -> list[UpdateCase]:
    shapes = benchmark.shapes[device.type][: 2 if quick else None]
    return [
        UpdateCase(benchmark, shape, dtype, variant, device)
        for shape in shapes
        for dtype in dtypes
        if dtype != torch.float16
        for variant in benchmark.variants
    ]


def providers_of(case: UpdateCase, compiled: bool = True) -> Iterator[Provider]:
    """Eager first, then the device's backends, then rivals. A step does not compile."""
    benchmark = case.benchmark
    yield Provider(BASELINE, benchmark.eager, gate="baseline")
    for backend in UPDATES[benchmark.op].order:
        if backend in NATIVE[case.device.type]:
            yield Provider(backend, functools.partial(benchmark.ours, backend=backend))
    for name, rival in benchmark.rivals.items():
        yield Provider(name, rival)


def measure(
    case: UpdateCase,
    roofs: Roofs,
    budget: timing.Budget,
    providers: list[Provider],
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, object]]:
    """The rows of a case: one a provider."""
    smallest = case.benchmark.shapes[case.device.type][0]
    baseline = _stepped(case, smallest, case.benchmark.eager)
    truth = _stepped(case, smallest, case.benchmark.truth, torch.float64)
    for provider in providers:
        if provider.gate != "baseline":
            provider.gate = _gate(_stepped(case, smallest, provider.call), baseline, truth)
            provider.gate += f" at {smallest[0]}" if provider.gate == "pass" else ""
    timed = [p for p in providers if not p.gate.startswith("FAIL")]
    clock = timing.Stopwatch(case.device)
    steps = {p.name: p.call(case.parameters(), **case.variant) for p in timed}
    runs = {name: functools.partial(_timed, step, clock) for name, step in steps.items()}
    samples = timing.interleave(runs, budget, tick)
    return [_row(case, p, samples, roofs) for p in providers]


def _stepped(case, shape, make: Maker, dtype=None) -> list[Tensor]:
    """The parameters after a few steps."""
    params = case.parameters(shape, dtype)
    step = make(params, **case.variant)
    for _ in range(GATE_STEPS):
        step()
    return [param.detach() for param in params]


def _gate(*results: list[Tensor]) -> str:
    """Of all parameters together: products in bfloat16 err by chance, on one more, on one less."""
    try:
        assert_no_worse(*(torch.cat([p.flatten() for p in r]) for r in results), what="parameter")
    except AssertionError as error:
        return f"FAIL {error}"
    return "pass"


def _timed(step: Step, clock: timing.Stopwatch) -> dict[str, tuple[float, float]]:
    clock.start()
    step()
    return {"step": clock.stop()}


def _row(case: UpdateCase, provider: Provider, samples: dict, roofs: Roofs) -> dict[str, object]:
    labels = {**case.labels(), "provider": provider.name, "part": "step", "gate": provider.gate}
    if provider.name not in samples:
        return {**labels, "note": provider.note}
    mine, base = samples[provider.name]["step"], samples[BASELINE]["step"]
    median, p20, p80 = timing.quantiles(mine.wall)
    work = case.benchmark.work("step", case.shape, case.dtype.itemsize, case.variant)
    is_cpu = case.device.type == "cpu"
    return {
        **labels,
        "ratio": timing.speedup(base.wall, mine.wall),
        "cpu_ratio": timing.speedup(base.cpu, mine.cpu) if is_cpu else None,
        **{"ms": median, "p20_ms": p20, "p80_ms": p80},
        "cpu_ms": timing.quantiles(mine.cpu)[0] if is_cpu else None,
        "gb_per_s": work / (1e6 * median),
        "percent_of_roof": 100 * work / (1e6 * median * roofs.copy),
        "turns": len(mine.wall),
        "note": provider.note,
    }


def with_masters(make: Maker) -> Maker:
    """torch's optimizer on float32 masters of bfloat16 parameters, written back after each step:
    what a user writes for the numbers that the optimizers here give."""

    def maker(params: list[Tensor], **variant) -> Step:
        if params[0].dtype in (torch.float32, torch.float64):
            return make(params, **variant)
        masters = [torch.nn.Parameter(param.detach().float()) for param in params]
        for master in masters:
            master.grad = torch.empty_like(master)
        step = make(masters, **variant)

        @torch.no_grad()
        def whole() -> None:
            torch._foreach_copy_([master.grad for master in masters], [p.grad for p in params])
            step()
            torch._foreach_copy_(params, masters)

        return whole

    return maker
