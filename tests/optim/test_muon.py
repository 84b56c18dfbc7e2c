"""Muon's numbers, against torch.optim.Muon and singular values in float64."""

import functools
import math

import pytest
import torch
from op_cases import assert_rounding_alone, device_of
from optim_cases import assert_same_bits, parameters, run, snapshot, states

from slimkernels.optim import Muon
from slimkernels.testing import assert_no_worse, forbid_synchronisation

OPTIONS = {
    "defaults": {},
    "plain momentum": {"nesterov": False, "momentum": 0.5},
    "as adamw": {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    "original": {"adjust_lr_fn": "original"},
    "numbers": {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 3, "eps": 1e-3, "momentum": 0.0},
}
BACKENDS = ["torch", "cpu", "triton"]
# Wide, tall, square; twice the same; more than a chunk of every backend.
SHAPES = [(8, 24), (40, 16), (17, 17), (8, 24), (1, 5), (5, 1), (130, 127), (0, 4)]
SMALL = [(8, 24), (40, 27), (17, 17), (8, 24), (1, 5), (0, 4)]


class BySingularValues:
    """Muon with a polynomial of singular values, which is what the iteration computes."""

    def __init__(self, params, lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, **options):
        self.params, self.lr, self.decay = params, lr, weight_decay
        self.momentum, self.nesterov, self.options = momentum, nesterov, options
        self.buffers = [torch.zeros_like(p) for p in params]

    def direction(self, d):
        a, b, c = self.options.get("ns_coefficients", (3.4445, -4.775, 2.0315))
        u, s, v = torch.linalg.svd(d, full_matrices=False)
        s = s / max(s.norm().item(), self.options.get("eps", 1e-7))
        for _ in range(self.options.get("ns_steps", 5)):
            s = a * s + b * s**3 + c * s**5
        return u @ torch.diag(s) @ v

    @torch.no_grad()
    def step(self):
        for w, b in zip(self.params, self.buffers, strict=True):
            if not w.numel():
                continue
            b.copy_(self.momentum * b + (1 - self.momentum) * w.grad)
            d = (1 - self.momentum) * w.grad + self.momentum * b if self.nesterov else b
            rows, columns = w.shape
            ratio = math.sqrt(max(1.0, rows / columns))
            if self.options.get("adjust_lr_fn") == "match_rms_adamw":
                ratio = 0.2 * math.sqrt(max(rows, columns))
            w.mul_(1 - self.lr * self.decay).sub_(self.direction(d), alpha=self.lr * ratio)


def shapes_and_steps(backend, option="defaults"):
    if backend == "triton" and not torch.cuda.is_available():
        return SMALL, 8
    return SHAPES, 200 if option == "defaults" else 50


@functools.cache
def baseline(option, shapes, steps, device):
    """torch's run, and the truth, which backends share."""
    options = {"lr": 0.02, **OPTIONS[option]}
    return (
        run(lambda p: torch.optim.Muon(p, **options), shapes, steps, device=device),
        run(lambda p: BySingularValues(p, **options), shapes, steps, torch.float64, device),
    )


def assert_run_matches(ours, theirs, truth):
    """Of all matrices together: products in bfloat16 err by chance, on one more, on one less."""
    a, b, c = (torch.cat([p.flatten() for p in r[0]]) for r in (ours, theirs, truth))
    assert_no_worse(a, b, c, what="parameters")
    columns = (states(ours[1], "momentum_buffer"), states(theirs[1], "momentum_buffer"))
    for i, (a, b, c) in enumerate(zip(*columns, truth[1].buffers, strict=True)):
        assert_no_worse(a, b, c, what=f"momentum_buffer {i}")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_torch(backend, option):
    shapes, steps = shapes_and_steps(backend, option)
    options, device = {"lr": 0.02, **OPTIONS[option]}, device_of(backend)
    with forbid_synchronisation():
        ours = run(lambda p: Muon(p, **options, backend=backend), shapes, steps, device=device)
    assert_run_matches(ours, *baseline(option, tuple(shapes), steps, device))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_definition_is_a_polynomial_of_singular_values(option):
    options = {"lr": 0.02, **OPTIONS[option]}
    ours, _ = run(lambda p: Muon(p, **options), SHAPES, 20, torch.float64)
    truth, _ = run(lambda p: BySingularValues(p, **options), SHAPES, 20, torch.float64)
    for a, b in zip(ours, truth, strict=True):
        # Newton and Schulz's polynomial multiplies the errors of small singular values by up to
        # 3.4445 each time, five times over; of that a step adds lr = 0.02.
        assert_rounding_alone(a, b, terms=20 * round(0.02 * 3.4445**5 * max(a.shape)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_follow_float32(backend):
    steps, device = 4 if backend == "triton" else 50, device_of(backend)
    ours = run(lambda p: Muon(p, backend=backend), SMALL, steps, torch.bfloat16, device)
    theirs = run(lambda p: torch.optim.Muon(p), SMALL, steps, device=device)
    truth = run(lambda p: BySingularValues(p), SMALL, steps, torch.float64, device)
    masters = states(ours[1], "master")
    assert_run_matches((masters, ours[1]), theirs, truth)
    assert_same_bits(ours[0], [master.bfloat16() for master in masters])


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_in_float32_where_bfloat16_is_slow(backend, monkeypatch):
    if backend != "cpu":
        pytest.skip("the CPU's choice")
    module = pytest.importorskip("slimkernels.backends.cpu.muon")
    theirs = run(lambda p: torch.optim.Muon(p), SMALL, 5)
    truth = run(lambda p: BySingularValues(p), SMALL, 5, torch.float64)
    for has_bfloat16 in (False, True):
        monkeypatch.setattr(module, "_HAS_BFLOAT16", has_bfloat16)
        assert_run_matches(run(lambda p: Muon(p, backend="cpu"), SMALL, 5), theirs, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_zeros(backend):
    param = torch.nn.Parameter(torch.ones(3, 5, device=device_of(backend)))
    optimizer = Muon([param], lr=0.5, weight_decay=0.5, backend=backend)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert (param == 0.75).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_and_any_number_of_threads(each_isa, dtype):
    """Of the kernels: with no product between them, there is nothing of torch's in the way."""
    shapes = [*SHAPES, (401, 250)]

    def ours(params):
        return Muon(params, ns_steps=0, max_grad_norm=1.0, backend="cpu")

    def plain(params):
        return Muon(params, ns_steps=0, max_grad_norm=1.0, backend="torch")

    eager, truth = (run(plain, shapes, 3, d)[0] for d in (torch.float32, torch.float64))
    threads = torch.get_num_threads()
    for _ in each_isa():
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            params, optimizer = run(ours, shapes, 3, dtype)
            results.append(snapshot(optimizer))
        torch.set_num_threads(threads)
        assert_same_bits(*results)
        values = params if dtype == torch.float32 else states(optimizer, "master")
        for a, b, c in zip(values, eager, truth, strict=True):
            assert_no_worse(a, b, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_skipped_changes_nothing(backend):
    params = parameters(SMALL, torch.float32, device_of(backend))
    optimizer = Muon(params, skip_nonfinite=True, backend=backend)
    for bad in (1.0, float("nan")):
        for param in params:
            param.grad = torch.full_like(param, bad)
        before = snapshot(optimizer)
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_in_a_tensor(backend):
    device = device_of(backend)
    rate = torch.tensor(0.0625, device=device)  # which float32 holds
    ours, _ = run(lambda p: Muon(p, rate, backend=backend), SMALL, 3, device=device)
    plain, _ = run(lambda p: Muon(p, 0.0625, backend=backend), SMALL, 3, device=device)
    assert_same_bits(ours, plain)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"adjust_lr_fn": "other"}, "adjust_lr_fn must be None, 'original' or"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers; got 2"),
        ({"ns_steps": 100}, "ns_steps must be an integer from 0 to 99; got 100"),
        ({"momentum": -0.1}, "momentum must be a number"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=f"^Muon: {sentence}"):
        Muon(parameters(SMALL, torch.float32), **options)


def test_only_matrices_are_taken():
    with pytest.raises(ValueError, match=r"^Muon: parameters must be matrices; got .* \(3,\)"):
        Muon([torch.nn.Parameter(torch.ones(3))])
