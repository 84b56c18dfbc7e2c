"""AdamW's numbers, against torch.optim.AdamW and float64."""

import pytest
import torch
from op_cases import assert_rounding_alone, device_of
from optim_cases import SHAPES, SMALL, assert_same_bits, parameters, run, snapshot, states

from slimkernels.optim import AdamW
from slimkernels.testing import assert_no_worse, forbid_synchronisation

OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0},
    "numbers": {"betas": (0.0, 0.7), "eps": 1e-3, "weight_decay": 0.3},
    "all": {"amsgrad": True, "maximize": True, "betas": (0.8, 0.99), "weight_decay": 0.1},
}
BACKENDS = ["torch", "cpu", "triton"]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def shapes_and_steps(backend, option):
    """Two hundred steps; the interpreter, which is slow, takes them once."""
    if backend != "triton" or torch.cuda.is_available():
        return SHAPES, 200
    return ([(7, 33)], 200) if option == "all" else (SMALL, 10)


def assert_run_matches(ours, theirs, truth):
    for i, (a, b, c) in enumerate(zip(*(r[0] for r in (ours, theirs, truth)), strict=True)):
        assert_no_worse(a, b, c, what=f"parameter {i}")
    for key in MOMENTS:
        if key in theirs[1].state[theirs[0][0]]:
            columns = (states(r[1], key) for r in (ours, theirs, truth))
            for i, (a, b, c) in enumerate(zip(*columns, strict=True)):
                assert_no_worse(a, b, c, what=f"{key} {i}")


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_torch(backend, option):
    shapes, steps = shapes_and_steps(backend, option)
    options = {"lr": 1e-2, **OPTIONS[option]}

    def torchs(params):
        return torch.optim.AdamW(params, **options)

    device = device_of(backend)
    with forbid_synchronisation():
        ours = run(lambda p: AdamW(p, **options, backend=backend), shapes, steps, device=device)
    theirs = run(torchs, shapes, steps, device=device)
    truth = run(torchs, shapes, steps, torch.float64, device)
    assert_run_matches(ours, theirs, truth)
    assert [step.item() for step in states(ours[1], "step")] == [steps] * len(shapes)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_definition_is_torchs(option):
    options = {"lr": 1e-2, **OPTIONS[option]}
    ours = run(lambda p: AdamW(p, **options, backend="torch"), SMALL, 50, torch.float64)
    theirs = run(lambda p: torch.optim.AdamW(p, **options), SMALL, 50, torch.float64)
    for a, b in zip(ours[0], theirs[0], strict=True):
        # A step rounds its numbers, of size 1, ten times or so; both sides of the comparison do.
        assert_rounding_alone(a, b, terms=50 * 10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_follow_float32(backend, dtype):
    """Rounding a parameter after each step would lose updates; its master must not."""
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("it is written for float32 and bfloat16")
    options = {"lr": 3e-4, "amsgrad": True}

    def torchs(params):
        return torch.optim.AdamW(params, **options)

    steps, device = 20 if backend == "triton" else 100, device_of(backend)
    params, optimizer = run(
        lambda p: AdamW(p, **options, backend=backend), SMALL, steps, dtype, device
    )
    theirs = run(torchs, SMALL, steps, device=device)
    truth = run(torchs, SMALL, steps, torch.float64, device)
    masters = states(optimizer, "master")
    assert_run_matches((masters, optimizer), theirs, truth)
    assert_same_bits(params, [master.to(dtype) for master in masters])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_masters(backend):
    def ours(params):
        return AdamW(params, lr=0.1, master_weights=False, backend=backend)

    device = device_of(backend)
    params, optimizer = run(ours, SMALL, 1, torch.bfloat16, device)
    assert "master" not in optimizer.state[params[0]]
    theirs, _ = run(lambda p: torch.optim.AdamW(p, lr=0.1), SMALL, 1, torch.bfloat16, device)
    truth, _ = run(lambda p: torch.optim.AdamW(p, lr=0.1), SMALL, 1, torch.float64, device)
    for a, b, c in zip(params, theirs, truth, strict=True):
        assert_no_worse(a, b, c)


@pytest.mark.parametrize("has_rate_tensor", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_learning_rate_that_changes(backend, has_rate_tensor):
    device = device_of(backend)

    def change(params, optimizer):
        group = optimizer.param_groups[0]
        if has_rate_tensor:
            group["lr"].mul_(0.5)
        else:
            group["lr"] *= 0.5

    def lr(dtype):
        return torch.tensor(0.5, dtype=dtype, device=device) if has_rate_tensor else 0.5

    def ours(p):
        return AdamW(p, lr(torch.float32), backend=backend)

    results = [run(ours, SMALL, 6, device=device, before_step=change)]
    for dtype in (torch.float32, torch.float64):

        def torchs(p, dtype=dtype):
            capturable = has_rate_tensor and device.type == "cuda"
            return torch.optim.AdamW(p, lr(dtype), capturable=capturable)

        results.append(run(torchs, SMALL, 6, dtype, device, change))
    assert_run_matches(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_gradients(backend):
    inf = float("inf")
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e15, -1e18, 1e25, inf, -inf, float("nan")])

    def stepped(make, dtype):
        param = torch.nn.Parameter(torch.ones(10, dtype=dtype, device=device_of(backend)))
        optimizer = make([param])
        for _ in range(2):
            param.grad = values.to(param)
            optimizer.step()
        return param

    ours = stepped(lambda p: AdamW(p, amsgrad=True, backend=backend), torch.float32)
    theirs = stepped(lambda p: torch.optim.AdamW(p, amsgrad=True), torch.float32)
    rtol = 8 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_every_time(backend):
    def ours(params):
        return AdamW(params, max_grad_norm=1.0, backend=backend)

    first, second = (run(ours, SMALL, 3, device=device_of(backend))[1] for _ in range(2))
    assert_same_bits(snapshot(first), snapshot(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set_and_any_number_of_threads(each_isa, dtype):
    shapes = [*SHAPES, (100003,)]

    def ours(params):
        return AdamW(params, amsgrad=True, max_grad_norm=1.0, backend="cpu")

    def torchs(params):
        optimizer = torch.optim.AdamW(params, amsgrad=True)
        optimizer.register_step_pre_hook(
            lambda *_: torch.nn.utils.clip_grad_norm_(params, 1.0) and None
        )
        return optimizer

    theirs, truth = (run(torchs, shapes, 4, d) for d in (torch.float32, torch.float64))
    threads = torch.get_num_threads()
    for _ in each_isa():
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            params, optimizer = run(ours, shapes, 4, dtype)
            results.append(snapshot(optimizer))
        torch.set_num_threads(threads)
        assert_same_bits(*results)
        values = params if dtype == torch.float32 else states(optimizer, "master")
        assert_run_matches((values, optimizer), theirs, truth)


def test_a_parameter_that_is_written_from_outside_stays_as_written():
    for backend in BACKENDS:
        params = parameters(SMALL, torch.bfloat16, device_of(backend))
        optimizer = AdamW(params, lr=1e-3, weight_decay=0.0, backend=backend)
        for step in range(3):
            for param in params:
                param.grad = torch.zeros_like(param)
            if step == 1:
                with torch.no_grad():
                    params[1][2:4] = 9.25
            optimizer.step()
        assert (params[1][2:4] == 9.25).all(), backend
        assert (optimizer.state[params[1]]["master"][2:4] == 9.25).all()
        untouched = parameters(SMALL, torch.bfloat16, device_of(backend))[1][:2]
        assert torch.equal(params[1][:2], untouched)
