"""torch.optim.Optimizer's interface: what every optimizer here shares with torch's."""

import copy
import inspect
import pickle

import pytest
import torch
from op_cases import device_of
from optim_cases import (
    BACKENDS,
    MATRICES,
    assert_same_bits,
    close,
    every_backend,
    every_optimizer,
    every_pair,
    feed,
    parameters,
    snapshot,
    train,
)

from slimkernels.dispatch import BackendError, use_backend
from slimkernels.optim import AdamW, Muon


@every_pair
def test_options_have_torchs_names_and_defaults(make, torchs):
    ours, theirs = (inspect.signature(c).parameters for c in (make, torchs))
    own = {"max_grad_norm", "skip_nonfinite", "master_weights", "backend"}
    assert list(ours)[-1] == "backend" and own <= set(ours)
    assert set(ours) - own == set(theirs)
    for name in theirs:
        assert ours[name].default == theirs[name].default, name
        assert ours[name].kind == theirs[name].kind, name


@pytest.mark.parametrize("hint", ["foreach", "fused"])
def test_which_of_torchs_ways_is_asked_for_changes_nothing(hint):
    params = parameters(MATRICES, torch.float32)
    train(params, AdamW(params))
    for value in (None, True, False):
        for in_a_group in (False, True):
            others = parameters(MATRICES, torch.float32)
            given = [{"params": others, hint: value}] if in_a_group else others
            train(others, AdamW(given, **({} if in_a_group else {hint: value})))
            assert_same_bits(params, others)


@every_optimizer
def test_a_step_to_differentiate_is_refused_in_a_group_too(make):
    with pytest.raises(ValueError, match=f"^{make.__name__}: differentiable must be False"):
        make([{"params": parameters(MATRICES, torch.float32), "differentiable": True}])


@every_optimizer
def test_copies_keep_their_options(make):
    params = parameters(MATRICES, torch.float32)
    options = dict(max_grad_norm=0.5, skip_nonfinite=True, master_weights=False)
    optimizer = make(params, **options, backend="torch")
    train(params, optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {name: getattr(other, name) for name in options} == options
        assert other.backend == "torch"
        train(other.param_groups[0]["params"], other, first_seed=3)
        assert other.grad_norm is not None


@every_optimizer
@every_backend
def test_parameters_without_gradient_are_left_alone(make, backend):
    params = parameters(MATRICES, torch.float32, device_of(backend))
    optimizer = make(params, backend=backend)
    optimizer.step()  # none has one
    assert not optimizer.state
    feed(params)
    params[1].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert torch.equal(params[1], before[1]) and params[1] not in optimizer.state
    assert not torch.equal(params[2], before[2])
    feed(params)
    optimizer.step()
    assert not torch.equal(params[1], before[1])
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@every_optimizer
def test_closure_and_hooks(make):
    param = torch.nn.Parameter(torch.eye(3))
    optimizer, seen = make([param], backend="cpu"), []
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        seen.append(torch.is_grad_enabled())
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert seen == [True, "after"]


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=8, cycle_momentum=False
    ),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("has_rate_tensor", [False, True])
@every_pair
def test_schedulers(make, torchs, name, has_rate_tensor):
    results = []
    for kind in (make, torchs):
        params = parameters(MATRICES, torch.float32)
        optimizer = kind(params, lr=torch.tensor(0.05) if has_rate_tensor else 0.05)
        scheduler = SCHEDULERS[name](optimizer)
        for seed in range(6):
            train(params, optimizer, 1, seed)
            scheduler.step()
        results.append(params)
    close(*results, make)


@every_backend
@every_pair
def test_groups_have_their_own_options_and_may_come_later(make, torchs, backend):
    results = []
    for kind, options in ((make, {"backend": backend}), (torchs, {})):
        params = parameters(MATRICES, torch.float32, device_of(backend))
        groups = [{"params": params[:1], "lr": 0.03}, {"params": params[1:2], "weight_decay": 0.5}]
        optimizer = kind(groups, **options)
        train(params[:2], optimizer)
        optimizer.add_param_group({"params": params[2:], "lr": 0.02})
        train(params, optimizer)
        results.append(params)
    close(*results, make)


HIGH_AND_LOW = [
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float32),
]


@pytest.mark.parametrize("high, low", HIGH_AND_LOW, ids=str)
@pytest.mark.parametrize("high_first", [True, False])
@pytest.mark.parametrize("backend", [None, "torch", "triton"])
def test_parameters_of_several_dtypes(backend, high_first, high, low):
    """One norm clips them all; each is updated as it would be alone."""
    if backend == "triton" and high == torch.float64:
        pytest.skip("Triton's updates take no float64")
    kinds, device = (high, low) if high_first else (low, high), device_of(backend or "cpu")
    pairs = zip(*(parameters(MATRICES, kind, device) for kind in kinds), strict=True)
    mixed = [p for pair in pairs for p in pair]
    exact = [torch.nn.Parameter(p.detach().double()) for p in mixed]
    ours = AdamW(mixed, lr=0.05, max_grad_norm=1.0, backend=backend)
    theirs = torch.optim.AdamW(exact, lr=0.05)
    for seed in range(3):
        feed(mixed, seed)
        for p, q in zip(mixed, exact, strict=True):
            q.grad = p.grad.double()
        ours.step()
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        theirs.step()
    for p, q in zip(mixed, exact, strict=True):
        moved = ours.state[p].get("master", p)
        close([moved.double()], [q])


@every_optimizer
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_learning_rate_of_one_dimension(make, backend):
    shapes = [(4, 6)] if make is Muon else [(), (4, 6)]
    params, others = (parameters(shapes, torch.float32) for _ in range(2))
    train(params, make(params, lr=torch.tensor([0.05]), backend=backend))
    train(others, make(others, lr=0.05, backend=backend))
    assert_same_bits(params, others)


@every_optimizer
@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_sparse_gradients_are_refused_in_a_sentence(make, backend):
    param = torch.nn.Parameter(torch.zeros(5, 3))
    param.grad = torch.ones(5, 3).to_sparse()
    optimizer = make([param], backend=backend)
    with pytest.raises(ValueError, match=f"^{make.__name__}: gradients must be dense; got one in"):
        optimizer.step()


WRONG = {
    "lr": (-0.1, "x", float("nan"), torch.ones(2), *map(torch.tensor, (-0.1, float("nan"), 1))),
    "betas": ((0.9, 1.0), (-0.1, 0.9), 0.9, (torch.tensor(0.9), 0.9)),
    "eps": (-1e-9,),
    "weight_decay": (-1.0, None),
    "max_grad_norm": (-1.0, float("inf")),
    "amsgrad": ("x", None),
    "nesterov": (1,),
    "maximize": (0,),
    "capturable": (1,),
    "foreach": (1,),
    "fused": ("yes",),
    "differentiable": (True, 0),
    "skip_nonfinite": ("no",),
    "master_weights": (None,),
    "backend": ("gpu", 3),
}


@every_optimizer
@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_in_a_sentence(make, name):
    if name not in inspect.signature(make).parameters:
        pytest.skip(f"{make.__name__} has no {name}")
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"^{make.__name__}: {name} must be "):
            make(parameters(MATRICES, torch.float32), **{name: value})


@every_optimizer
def test_a_group_with_a_wrong_number_is_not_added(make):
    params = parameters(MATRICES, torch.float32)
    optimizer = make(params[:2])
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.add_param_group({"params": params[2:], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_options_of_the_whole_optimizer_are_refused_in_a_group(make):
    own = dict(max_grad_norm=1.0, skip_nonfinite=True, master_weights=False, backend="torch")
    for name, value in own.items():
        with pytest.raises(ValueError, match=f"^{make.__name__}: {name} must be given for the"):
            make([{"params": parameters(MATRICES, torch.float32), name: value}])


@every_optimizer
def test_a_parameter_given_twice_is_refused(make):
    param = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = make(parameters(MATRICES, torch.float32))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),  # torch's own
        pytest.raises(ValueError, match=f"^{make.__name__}: a group must hold each parameter once"),
    ):
        optimizer.add_param_group({"params": [param, param]})
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_explain_says_what_runs(make):
    params = parameters(MATRICES, torch.float32)
    optimizer = make(params)
    assert optimizer.explain() == f"{make.__name__}: no parameter has a gradient"
    feed(params)
    text = optimizer.explain()
    assert f"{make.__name__.lower()} runs on " in text and "3 tensors, torch.float32" in text
    with use_backend("torch"):
        assert "runs on torch" in optimizer.explain()
    doubles = parameters(MATRICES, torch.float64)
    feed(doubles)
    optimizer = make(doubles)
    assert "it is written for float32 and bfloat16" in optimizer.explain()
    optimizer.step()
    with pytest.raises(BackendError, match="cpu was asked for, but it is written for float32"):
        make(doubles, backend="cpu").step()


@every_optimizer
def test_a_step_may_stand_in_compiled_code(make):
    params, expected = (parameters(MATRICES, torch.float32) for _ in range(2))
    optimizer, plain = make(params), make(expected)
    compiled = torch.compile(optimizer.step, backend="eager")
    for seed in range(2):
        feed(params, seed)
        feed(expected, seed)
        compiled()
        plain.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain))


@every_optimizer
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_step_can_be_captured(make):
    def prepared():
        params = parameters(MATRICES, torch.float32, "cuda")
        feed(params)
        rate = torch.tensor(0.01, device="cuda")
        return params, make(params, lr=rate, max_grad_norm=1.0, skip_nonfinite=True), rate

    params, optimizer, rate = prepared()
    expected, plain, its_rate = prepared()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        rate.mul_(0.5)
        its_rate.mul_(0.5)
        graph.replay()
        plain.step()
    assert_same_bits(snapshot(optimizer), snapshot(plain))
