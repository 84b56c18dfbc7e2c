"""What an optimizer keeps of the tensors that it was given, and what it notices of new ones."""

import weakref

import pytest
import torch
from op_cases import device_of
from optim_cases import parameters

from slimkernels import optim
from slimkernels.dispatch import BackendError
from slimkernels.optim import AdamW

BACKENDS = ["torch", "cpu", "triton"]
SHAPES = [(4, 6), (6, 4), (3, 3)]

every_optimizer = pytest.mark.parametrize("make", [getattr(optim, n) for n in optim.__all__])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_optimizer
@every_backend
def test_gradients_are_freed_by_whoever_zeroes_them(make, backend):
    params = parameters(SHAPES, torch.float32, device_of(backend))
    optimizer = make(params, max_grad_norm=1.0, backend=backend)
    for seed in range(2):
        torch.manual_seed(seed)
        for param in params:
            param.grad = torch.randn_like(param)
        grads = [weakref.ref(p.grad) for p in params]
        optimizer.explain()
        optimizer.step()
        optimizer.zero_grad()
        assert not any(grad() is not None for grad in grads)


@every_backend
def test_a_parameter_that_shrinks_where_it_lies(backend):
    """The addresses stay, and what lies past its end is no longer the parameter's."""
    memory = torch.randn(1000, device=device_of(backend))
    param = torch.nn.Parameter(memory[:])
    optimizer = AdamW([param], lr=0.1, backend=backend)
    param.grad = torch.randn_like(param)
    optimizer.step()
    param.data = param.data[:10]
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[param][name] = optimizer.state[param][name][:10]
    before = memory.clone()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal(memory[10:], before[10:]) and not torch.equal(memory[:10], before[:10])


def test_a_state_of_another_shape_is_no_kernels():
    param = torch.nn.Parameter(torch.randn(8))
    optimizer = AdamW([param], backend="cpu")
    param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = torch.zeros(5)
    with pytest.raises(BackendError, match="exp_avg has"):
        optimizer.step()


def test_a_state_that_moved_is_no_kernels():
    """And what a step that failed was given is let go of all the same."""
    param = torch.nn.Parameter(torch.randn(8))
    optimizer = AdamW([param], backend="cpu")
    param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg"] = optimizer.state[param]["exp_avg"].to("meta")
    with pytest.raises(BackendError, match="exp_avg is on meta"):
        optimizer.step()
    grad = weakref.ref(param.grad)
    optimizer.zero_grad()
    assert grad() is None


@pytest.mark.parametrize("backend", [None, "torch"])
def test_a_lazy_negation_is_carried_out(backend):
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = AdamW([param], lr=0.1, weight_decay=0.0, backend=backend)
    param.grad = torch._neg_view(torch.ones(64))
    optimizer.step()
    assert (param > 0).all()
