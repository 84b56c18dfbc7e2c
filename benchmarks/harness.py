"""A benchmark is a declaration; the harness owns the protocol.

For each shape, dtype and variant: every provider must pass the correctness gate, and then the
providers that passed are timed in turns (timing.py). A provider that fails the gate has a row that
says so and no number. A row in which eager PyTorch wins stays in.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import slimkernels
from benchmarks import timing
from slimkernels import dispatch
from slimkernels.testing import assert_no_worse, run_with_gradients

BASELINE, COMPILED = "eager", "compiled"
NATIVE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
PARTS = ("inference", "forward", "backward", "both")
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}


def _as_they_are(*inputs: Tensor, **variant) -> tuple[tuple, dict]:
    return inputs, variant


def _same_shape(shape: tuple) -> tuple:
    return shape


@dataclass(frozen=True)
class Benchmark:
    """What is measured of one op.

    op              its name in slimkernels
    shapes          device type -> shapes, those of --quick first
    inputs          ``inputs(shape, dtype, device)`` -> tensors; floating ones get gradients
    eager           ``eager(*inputs, **variant)``: what a user of plain PyTorch writes
    call            ``call(*inputs, **variant)`` -> args, kwargs of the public function
    variants        keywords that change the work: dropout_p, is_causal, ...
    bytes_forward, bytes_backward, flops_forward, flops_backward
                    ``f(*shape, s, **variant)`` with s bytes an element: the least that must move
                    or be computed; one pair is given, the roof is the copy or the matrix rate
    rivals          name -> the same work by another library, like eager; raises where it cannot
    gate_shape      the shape at which a timed shape is checked, where float64 would not fit
    """

    op: str
    shapes: dict[str, list[tuple]]
    inputs: Callable[[tuple, torch.dtype, torch.device], tuple[Tensor, ...]]
    eager: Callable
    call: Callable[..., tuple[tuple, dict]] = _as_they_are
    variants: tuple[dict, ...] = ({},)
    bytes_forward: Callable[..., float] | None = None
    bytes_backward: Callable[..., float] | None = None
    flops_forward: Callable[..., float] | None = None
    flops_backward: Callable[..., float] | None = None
    rivals: dict[str, Callable] = field(default_factory=dict)
    gate_shape: Callable[[tuple], tuple] = _same_shape

    def __post_init__(self) -> None:
        if (self.bytes_forward is None) == (self.flops_forward is None):
            raise ValueError(f"{self.op}: a benchmark counts bytes or flops, one of the two")

    def ours(self, *inputs: Tensor, backend: str | None, **variant):
        args, kwargs = self.call(*inputs, **variant)
        return getattr(slimkernels, self.op)(*args, **kwargs, backend=backend)

    def ready(self, *inputs: Tensor, backend: str | None, **variant) -> Callable[[], object]:
        """``ours`` with its arguments made: what is timed is the call that a user writes."""
        args, kwargs = self.call(*inputs, **variant)
        function = getattr(slimkernels, self.op)
        return lambda: function(*args, **kwargs, backend=backend)

    def work(self, part: str, shape: tuple, itemsize: int, variant: dict) -> float:
        """Bytes or flops of a part."""
        counts = (self.bytes_forward, self.bytes_backward)
        if self.bytes_forward is None:
            counts = (self.flops_forward, self.flops_backward)
        forward, backward = (count(*shape, s=itemsize, **variant) for count in counts)
        parts = forward, forward, backward, forward + backward
        return dict(zip(PARTS, parts, strict=True))[part]


@dataclass(frozen=True)
class Case:
    """One shape, dtype and variant of a benchmark on a device."""

    benchmark: Benchmark
    shape: tuple
    dtype: torch.dtype
    variant: dict
    device: torch.device

    def inputs(self, shape: tuple | None = None) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return self.benchmark.inputs(shape or self.shape, self.dtype, self.device)

    def labels(self) -> dict[str, str]:
        return {
            "op": self.benchmark.op,
            "shape": "x".join(map(str, self.shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "variant": " ".join(f"{name}={value}" for name, value in self.variant.items()),
        }

    @property
    def is_random(self) -> bool:
        return self.variant.get("dropout_p", 0) > 0


@dataclass
class Provider:
    """One way to compute the op: ``call(*inputs)``; timed is ``ready(*inputs)()`` if given."""

    name: str
    call: Callable | None
    note: str = ""
    gate: str = "not run"
    ready: Callable | None = None

    def on(self, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
        return self.ready(*inputs) if self.ready else functools.partial(self.call, *inputs)


@dataclass
class Roofs:
    """The device's own rates, measured in the same run."""

    device: torch.device
    copy: float = field(init=False)
    matmul: dict[torch.dtype, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.copy = timing.copy_bandwidth(self.device)

    def of(self, benchmark: Benchmark, dtype: torch.dtype) -> float:
        """GB/s for an op that counts bytes, TFLOP/s for one that counts operations."""
        if benchmark.bytes_forward is not None:
            return self.copy
        if dtype not in self.matmul:
            self.matmul[dtype] = timing.matmul_rate(self.device, dtype)
        return self.matmul[dtype]

    def lines(self) -> dict[str, str]:
        """For a result's header."""
        rates = [f"{str(d).removeprefix('torch.')} {r:.3g}" for d, r in self.matmul.items()]
        lines = {"copy bandwidth": f"{self.copy:.0f} GB/s, bytes read plus bytes written"}
        return lines | ({"matrix products": ", ".join(rates) + " TFLOP/s"} if rates else {})


def cases_of(
    benchmark: Benchmark, device: torch.device, dtypes: list[torch.dtype], quick: bool
) -> list[Case]:
    shapes = benchmark.shapes[device.type][: 2 if quick else None]
    return [
        Case(benchmark, shape, dtype, variant, device)
        for shape in shapes
        for dtype in dtypes
        for variant in benchmark.variants
    ]


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has a C++ compiler here, which a GPU's launchers need too."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def providers_of(case: Case, compiled: bool = True) -> Iterator[Provider]:
    """Eager first; then every backend of the device, its rivals, and torch.compile."""
    benchmark, variant = case.benchmark, case.variant
    eager = functools.partial(benchmark.eager, **variant)
    yield Provider(BASELINE, eager, gate="baseline")
    op = dispatch.OPS[benchmark.op]
    args, kwargs = benchmark.call(*case.inputs(), **variant)
    arguments = op.arguments(*args, **kwargs)
    delegates = op.select(*arguments) == "torch"
    for backend in (name for name in op.order if name in NATIVE[case.device.type]):
        if isinstance(op.modules[backend], str) and not delegates:
            continue  # no such kernel; another backend runs
        if reason := op.unsupported(backend, *arguments):
            verdict = "delegates to eager" if delegates else "refused"
            yield Provider(backend, None, note=f"{verdict}: {reason}")
        else:
            yield _ours(benchmark, backend, variant, backend)
    if delegates:
        # By the automatic choice, which is what it costs: one made by name would be another path.
        yield _ours(benchmark, None, variant, "torch", "what slimkernels runs: the op's reference")
    for name, rival in benchmark.rivals.items():
        yield Provider(name, functools.partial(rival, **variant))
    if compiled and can_compile(case.device):
        torch._dynamo.reset()  # each case is its own program: no limit of recompilations is met
        yield Provider(COMPILED, torch.compile(eager, dynamic=False))


def _ours(
    benchmark: Benchmark, backend: str | None, variant: dict, name: str, note: str = ""
) -> Provider:
    of = functools.partial(benchmark.ours, backend=backend, **variant)
    ready = functools.partial(benchmark.ready, backend=backend, **variant)
    return Provider(name, of, note, ready=ready)


class Gate:
    """No number without the right answer: outputs and every gradient, against float64.

    The bound is twice eager's own error. With dropout eager draws another mask; the baseline is
    then the op's reference in the same dtype, with the same seed, and torch's own providers,
    which cannot be compared number by number, say so.
    """

    def __init__(self, case: Case) -> None:
        self.random = case.is_random
        self.rivals = case.benchmark.rivals
        self.inputs = case.inputs(case.benchmark.gate_shape(case.shape))
        self.where = case.benchmark.gate_shape(case.shape)
        self.shape = case.shape
        wide = tuple(t.double() if t.is_floating_point() else t for t in self.inputs)
        reference = functools.partial(case.benchmark.ours, backend="torch", **case.variant)
        eager = functools.partial(case.benchmark.eager, **case.variant)
        self.baseline = self._run(reference if self.random else eager, self.inputs)
        self.truth = self._run(reference, wide)

    def _run(self, function: Callable, inputs: tuple) -> dict[str, Tensor]:
        def seeded(*leaves):
            torch.manual_seed(1)
            return function(*leaves)

        return run_with_gradients(seeded, inputs)

    def check(self, provider: Provider) -> str:
        """ "pass", or why no number of this provider may be shown."""
        if self.random and provider.name in (COMPILED, *self.rivals):
            return f"not comparable: {provider.name} draws its own dropout mask"
        actual = self._run(provider.call, self.inputs)
        try:
            for name, expected in self.truth.items():
                assert_no_worse(actual[name], self.baseline[name], expected, what=name)
        except AssertionError as error:
            return f"FAIL {error}"
        return "pass" if self.where == self.shape else f"pass at {'x'.join(map(str, self.where))}"


def measure(
    case: Case,
    roofs: Roofs,
    budget: timing.Budget,
    providers: list[Provider] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, object]]:
    """The rows of a case: one a provider and part, in the order of the providers."""
    providers = list(providers_of(case)) if providers is None else providers
    _gate(case, providers)
    inputs = case.inputs()
    leaves = tuple(t.requires_grad_() if t.is_floating_point() else t for t in inputs)
    clock = timing.Stopwatch(case.device)
    timed = [p for p in providers if p.call is not None and not p.gate.startswith("FAIL")]
    peaks = {p.name: _peak_memory(p, leaves, case.device) for p in timed}
    runs = {p.name: functools.partial(_run_once, p.on(leaves), leaves, clock) for p in timed}
    samples = timing.interleave(runs, budget, tick)
    return [row for p in providers for row in _rows(case, p, samples, peaks, roofs)]


def _gate(case: Case, providers: list[Provider]) -> None:
    """Check each provider but the baseline; one that cannot run at all says so in its row."""
    gate = Gate(case)
    for provider in providers:
        if provider.call is None or provider.gate == "baseline":
            continue
        try:
            provider.gate = gate.check(provider)
        except RuntimeError as error:  # out of memory, or torch.compile cannot build
            provider.gate = f"FAIL could not run: {' '.join(str(error).split())[:200]}"


def _run_once(call: Callable, leaves: tuple, clock: timing.Stopwatch) -> dict:
    with torch.no_grad():
        clock.start()
        outputs = call()
        inference = clock.stop()
    del outputs
    clock.start()
    outputs = call()
    forward = clock.stop()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dys = _gradients_of_outputs(outputs)
    wanted = [t for t in leaves if t.requires_grad]
    clock.start()
    torch.autograd.grad(outputs, wanted, dys)
    backward = clock.stop()
    both = (forward[0] + backward[0], forward[1] + backward[1])
    return dict(zip(PARTS, (inference, forward, backward, both), strict=True))


_dys: dict[tuple, Tensor] = {}


def _gradients_of_outputs(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Random numbers, drawn once: zeros and ones can run faster than what training sees.

    But 1 for a scalar, which is a loss: with that training begins.
    """
    keys = [(i, tuple(y.shape), y.dtype, y.device) for i, y in enumerate(outputs)]
    if any(key not in _dys for key in keys):
        _dys.clear()
        _dys.update({key: _gradient_of(y) for key, y in zip(keys, outputs, strict=True)})
    return tuple(_dys[key] for key in keys)


def _gradient_of(y: Tensor) -> Tensor:
    return torch.randn_like(y) if y.dim() else torch.ones_like(y)


def _peak_memory(provider: Provider, leaves: tuple, device: torch.device) -> float | None:
    """MiB above the inputs at the peak of one forward and backward; on a GPU only."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = provider.call(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in leaves if t.requires_grad]
    torch.autograd.grad(outputs, wanted, _gradients_of_outputs(outputs))
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _rows(
    case: Case, provider: Provider, samples: dict, peaks: dict, roofs: Roofs
) -> Iterator[dict[str, object]]:
    labels = {**case.labels(), "provider": provider.name, "gate": provider.gate}
    if provider.name not in samples:
        yield {**labels, "part": "both", "note": provider.note}
        return
    unit, scale = ("gb_per_s", 1e6) if case.benchmark.bytes_forward else ("tflop_per_s", 1e9)
    roof = roofs.of(case.benchmark, case.dtype)
    for part in PARTS:
        mine, base = samples[provider.name][part], samples[BASELINE][part]
        median, p20, p80 = timing.quantiles(mine.wall)
        work = case.benchmark.work(part, case.shape, case.dtype.itemsize, case.variant)
        rate = work / (scale * median)
        is_cpu = case.device.type == "cpu"
        yield {
            **labels,
            "part": part,
            "ratio": timing.speedup(base.wall, mine.wall),
            "cpu_ratio": timing.speedup(base.cpu, mine.cpu) if is_cpu else None,
            "ms": median,
            "p20_ms": p20,
            "p80_ms": p80,
            "cpu_ms": timing.quantiles(mine.cpu)[0] if is_cpu else None,
            unit: rate,
            "percent_of_roof": 100 * rate / roof,
            "peak_mib": peaks[provider.name] if part == "both" else None,
            "turns": len(mine.wall),
            "note": provider.note,
        }
