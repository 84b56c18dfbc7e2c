"""LAMB's numbers, against the paper's algorithm in float64."""

import pytest
import torch
from op_cases import assert_rounding_alone, device_of
from optim_cases import SHAPES, SMALL, assert_same_bits, parameters, run, snapshot, states

from slimkernels.optim import LAMB
from slimkernels.testing import assert_no_worse, forbid_synchronisation

OPTIONS = {
    "defaults": {},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0},
    "no eps": {"eps": 0.0},
    "numbers": {"betas": (0.0, 0.7), "eps": 1e-3, "weight_decay": 0.3},
}
BACKENDS = ["torch", "cpu", "triton"]


class Paper:
    """Algorithm 2 of You et al. 2020, line by line, phi being the identity."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-2, **sign):
        self.params, self.lr, self.betas, self.eps, self.decay = (
            params,
            lr,
            betas,
            eps,
            weight_decay,
        )
        self.sign = -1 if sign.get("maximize") else 1
        self.t = 0
        self.m = [torch.zeros_like(x) for x in params]
        self.v = [torch.zeros_like(x) for x in params]

    @torch.no_grad()
    def step(self):
        self.t += 1
        b1, b2 = self.betas
        for x, m, v in zip(self.params, self.m, self.v, strict=True):
            g = self.sign * x.grad
            m.copy_(b1 * m + (1 - b1) * g)
            v.copy_(b2 * v + (1 - b2) * g * g)
            r = m / (1 - b1**self.t) / (torch.sqrt(v / (1 - b2**self.t)) + self.eps)
            u = r + self.decay * x
            size, length = x.norm().item(), u.norm().item()
            ratio = size / length if size > 0 and length > 0 else 1.0
            x -= self.lr * ratio * u


def shapes_and_steps(backend):
    slow = backend == "triton" and not torch.cuda.is_available()
    return (SMALL, 8) if slow else (SHAPES, 200)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_the_paper(backend, option):
    shapes, steps = shapes_and_steps(backend)
    options, device = {"lr": 1e-2, **OPTIONS[option]}, device_of(backend)
    with forbid_synchronisation():
        ours, optimizer = run(
            lambda p: LAMB(p, **options, backend=backend), shapes, steps, device=device
        )
    eager, plain = run(lambda p: Paper(p, **options), shapes, steps, device=device)
    truth, paper = run(lambda p: Paper(p, **options), shapes, steps, torch.float64, device)
    for i, (a, b, c) in enumerate(zip(ours, eager, truth, strict=True)):
        assert_no_worse(a, b, c, what=f"parameter {i}")
    for key, column in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        columns = (states(optimizer, key), getattr(plain, column), getattr(paper, column))
        for a, b, c in zip(*columns, strict=True):
            assert_no_worse(a, b, c, what=key)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_definition_is_the_papers(option):
    options = {"lr": 1e-2, **OPTIONS[option]}
    ours, _ = run(lambda p: LAMB(p, **options), SMALL, 50, torch.float64)
    paper, _ = run(lambda p: Paper(p, **options), SMALL, 50, torch.float64)
    for a, b in zip(ours, paper, strict=True):
        # A step rounds its numbers, of size 1, ten times or so, and its norms by few terms more.
        assert_rounding_alone(a, b, terms=50 * 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masters_follow_float32(backend):
    steps, device = 6 if backend == "triton" else 100, device_of(backend)
    params, optimizer = run(
        lambda p: LAMB(p, lr=1e-4, backend=backend), SMALL, steps, torch.bfloat16, device
    )
    eager, _ = run(lambda p: Paper(p, lr=1e-4), SMALL, steps, device=device)
    truth, _ = run(lambda p: Paper(p, lr=1e-4), SMALL, steps, torch.float64, device)
    masters = states(optimizer, "master")
    for a, b, c in zip(masters, eager, truth, strict=True):
        assert_no_worse(a, b, c)
    assert_same_bits(params, [master.bfloat16() for master in masters])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_or_a_direction_of_zeros(backend):
    """Where there is no ratio of norms, it is 1."""
    device = device_of(backend)
    zeros = torch.nn.Parameter(torch.zeros(3, 5, device=device))
    still = torch.nn.Parameter(torch.ones(3, 5, device=device))
    optimizer = LAMB([zeros, still], lr=0.1, weight_decay=0.0, backend=backend)
    zeros.grad, still.grad = torch.ones_like(zeros), torch.zeros_like(still)
    optimizer.step()
    # The optimizer's eps, and rounding.
    assert (zeros + 0.1).abs().max() <= 0.1 * (1e-6 + 4 * torch.finfo(torch.float32).eps)
    assert (still == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_in_a_tensor(backend):
    device = device_of(backend)
    rate = torch.tensor(0.0625, device=device)  # which float32 holds
    ours, _ = run(lambda p: LAMB(p, rate, backend=backend), SMALL, 3, device=device)
    plain, _ = run(lambda p: LAMB(p, 0.0625, backend=backend), SMALL, 3, device=device)
    assert_same_bits(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_and_any_number_of_threads(each_isa, dtype):
    shapes = [*SHAPES, (100003,)]
    eager, _ = run(lambda p: Paper(p), shapes, 4)
    truth, _ = run(lambda p: Paper(p), shapes, 4, torch.float64)
    threads = torch.get_num_threads()
    for _ in each_isa():
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            params, optimizer = run(lambda p: LAMB(p, backend="cpu"), shapes, 4, dtype)
            results.append(snapshot(optimizer))
        torch.set_num_threads(threads)
        assert_same_bits(*results)
        values = params if dtype == torch.float32 else states(optimizer, "master")
        for a, b, c in zip(values, eager, truth, strict=True):
            assert_no_worse(a, b, c)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_skipped_changes_nothing(backend):
    params = parameters(SMALL, torch.float32, device_of(backend))
    optimizer = LAMB(params, skip_nonfinite=True, max_grad_norm=1.0, backend=backend)
    for bad in (1.0, float("nan")):
        for param in params:
            param.grad = torch.full_like(param, bad)
        before = snapshot(optimizer)
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
