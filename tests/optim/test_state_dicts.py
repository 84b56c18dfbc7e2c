"""State dicts: to torch's optimizers and back, and what is refused before anything is loaded."""

import copy
import io
import re

import pytest
import torch
from op_cases import device_of
from optim_cases import (
    MATRICES,
    OURS,
    assert_same_bits,
    close,
    every_backend,
    every_optimizer,
    every_pair,
    parameters,
    snapshot,
    train,
)

from slimkernels.optim import LAMB, AdamW


@every_backend
@every_pair
def test_a_state_dict_goes_both_ways(make, torchs, backend):
    device = device_of(backend)
    params, others = (parameters(MATRICES, torch.float32, device) for _ in range(2))
    ours, theirs = make(params, lr=0.01, backend=backend), torchs(others, lr=0.01)
    train(params, ours)
    train(others, theirs)
    assert ours.state_dict()["state"][0].keys() == theirs.state_dict()["state"][0].keys()
    loaded, given = make(params, backend=backend), torchs(others)
    loaded.load_state_dict(theirs.state_dict())
    given.load_state_dict(ours.state_dict())
    assert loaded.param_groups[0]["lr"] == given.param_groups[0]["lr"] == 0.01
    train(params, loaded, first_seed=3)
    train(others, given, first_seed=3)
    close(params, others, make)
    # Two optimizers must not write one state.
    assert ours.state[params[0]].keys() == loaded.state[params[0]].keys()
    for key, value in theirs.state[others[0]].items():
        assert value.data_ptr() != loaded.state[params[0]][key].data_ptr()


@every_pair
def test_torchs_bfloat16_state_is_widened(make, torchs):
    others, params = (parameters(MATRICES, torch.bfloat16) for _ in range(2))
    theirs, ours = torchs(others), make(params)
    train(others, theirs)
    ours.load_state_dict(theirs.state_dict())
    assert all(v.dtype == torch.float32 for v in ours.state[params[0]].values())
    for param, other in zip(params, others, strict=True):
        param.data.copy_(other)
    train(params, ours)
    assert ours.state[params[0]]["master"].dtype == torch.float32
    torchs(others).load_state_dict(ours.state_dict())


@every_optimizer
@every_backend
def test_a_saved_run_goes_on_as_if_never_saved(make, backend):
    device = device_of(backend)
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(MATRICES, dtype, device)
        optimizer = make(params, backend=backend)
        train(params, optimizer)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
        resumed = make(copies, lr=7.0, backend=backend)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        train(params, optimizer, first_seed=3)
        train(copies, resumed, first_seed=3)
        assert_same_bits(snapshot(optimizer), snapshot(resumed))


@every_optimizer
def test_another_optimizers_state_dict_is_refused(make):
    params = parameters(MATRICES, torch.float32)
    optimizer = make(params)
    train(params, optimizer)
    before = snapshot(optimizer)
    torchs = [getattr(torch.optim, name) for name in ("SGD", "RMSprop", "RAdam", "AdamW", "Muon")]
    others = [kind(params) for kind in (*torchs, *OURS) if kind.__name__ != make.__name__]
    for other in (torch.optim.SGD(params, momentum=0.9), *others):
        other.step()
        said = f"^{make.__name__}: the state dict is another optimizer's: its .* ha"
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(other.state_dict())
    assert (
        optimizer.state[params[0]].keys()
        == make(params)._state_of(optimizer.param_groups[0], params[0]).keys()
    )
    assert_same_bits(before[len(params) :], snapshot(optimizer)[len(params) :])


WRONG_STATE = {
    "shape": (lambda value: value[:-1], "torch.float32 of (3, 6)"),
    "dtype": (lambda value: value.to(torch.int8), "torch.int8 of (4, 6)"),
    "type": (lambda value: value.tolist(), "list"),
}


@every_optimizer
@pytest.mark.parametrize("wrong", WRONG_STATE)
def test_a_state_that_does_not_fit_is_refused_as_it_is_loaded(make, wrong):
    params = parameters(MATRICES, torch.bfloat16)
    optimizer = make(params)
    train(params, optimizer)
    before = snapshot(optimizer)
    spoil, got = WRONG_STATE[wrong]
    names = [name for name in optimizer.state[params[0]] if name != "step"]
    assert "master" in names
    for name in names:
        said = f"{make.__name__}: {name} of parameter 0 must be real and of its shape (4, 6); "
        with pytest.raises(ValueError, match=f"^{re.escape(said + 'got ' + got)}$"):
            optimizer.load_state_dict(altered(optimizer, name, spoil))
    assert_same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("make", [AdamW, LAMB])
def test_a_count_of_steps_is_one_number(make):
    params = parameters(MATRICES, torch.float32)
    optimizer = make(params)
    train(params, optimizer)
    with pytest.raises(ValueError, match="step of parameter 0 must be one number; got torch.float"):
        optimizer.load_state_dict(altered(optimizer, "step", lambda value: torch.ones(2)))
    for count in (-1, torch.tensor(torch.nan)):
        with pytest.raises(ValueError, match="step of parameter 0 must be 0 or more; got (-1|nan)"):
            optimizer.load_state_dict(altered(optimizer, "step", lambda _, count=count: count))
    with pytest.raises(ValueError, match="the state dict must have state and param_groups"):
        optimizer.load_state_dict({})
    for count in (7, 7.0, torch.tensor([7.0])):
        optimizer.load_state_dict(altered(optimizer, "step", lambda value, count=count: count))
        train(params, optimizer, 1)
        assert optimizer.state[params[0]]["step"] == 8


def altered(optimizer, name, change):
    """The optimizer's state dict with one thing of its first parameter's state changed."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0][name] = change(state_dict["state"][0][name])
    return state_dict


@every_optimizer
def test_a_loaded_number_is_checked_as_a_given_one(make):
    params = parameters(MATRICES, torch.float32)
    optimizer = make(params, lr=0.25)
    train(params, optimizer)
    wrong = {"lr": -1.0, "eps": -1.0, "weight_decay": None, "maximize": 1, "differentiable": True}
    wrong |= {"betas": (0.9, 1.0), "ns_steps": -1}
    for name, value in wrong.items():
        if name not in (*optimizer.defaults, "differentiable"):
            continue
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0][name] = value
        with pytest.raises(ValueError, match=f"^{make.__name__}: {name} must be "):
            optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.25
