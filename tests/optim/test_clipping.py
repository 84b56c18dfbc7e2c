"""The norm of all gradients, clipping by it, and steps that are not taken."""

import copy
import math

import pytest
import torch
from op_cases import device_of
from optim_cases import SMALL, assert_same_bits, drawn, parameters, snapshot

from slimkernels.ops._update import TensorLists
from slimkernels.ops.grad_norm import grad_norm
from slimkernels.optim import AdamW
from slimkernels.testing import assert_no_worse, forbid_synchronisation

BACKENDS = ["torch", "cpu", "triton"]
SHAPES = [*SMALL, (2048,), (2049,), (40001,)]


def lists_of(backend, *dtypes, scale=1.0):
    tensors = drawn(SHAPES, 3, scale)
    return [
        TensorLists({"grad": [t.to(device_of(backend), dtype) for t in tensors]})
        for dtype in dtypes
    ]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "bfloat16"]], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_and_coefficient(backend, dtypes, scale):
    lists = lists_of(backend, *(getattr(torch, name) for name in dtypes), scale=scale)
    with forbid_synchronisation():
        clip = grad_norm(lists, max_norm=2.0, backend=backend)
    grads = [g.float() for each in lists for g in each.columns["grad"]]  # exactly
    eager = torch.nn.utils.get_total_norm(grads)
    truth = torch.nn.utils.get_total_norm([g.double() for g in grads])
    assert_no_worse(clip[0], eager, truth)
    rounding = torch.finfo(torch.float32).eps  # of the norm, and of the quotient
    assert clip[1].item() == pytest.approx(min(2.0 / (clip[0].item() + 1e-6), 1.0), rel=rounding)
    assert clip[2] == 1 and clip.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_element_is_seen(backend, place, bad):
    (lists,) = lists_of(backend, torch.float32)
    lists.columns["grad"][-1].view(-1)[place] = bad
    clip = grad_norm([lists], max_norm=1.0, skip_nonfinite=True, backend=backend)
    norm, coefficient, applies = clip.tolist()
    assert applies == 0
    assert math.isnan(norm) and math.isnan(coefficient) if math.isnan(bad) else coefficient == 0
    assert grad_norm([lists], backend=backend)[1:].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_does_not_depend_on_threads(each_isa, dtype):
    lists = lists_of("cpu", dtype)
    lists += [TensorLists({"grad": [torch.randn(300001)]})]
    threads = torch.get_num_threads()
    for _ in each_isa():
        norms = set()
        for count in (1, 2, threads):
            torch.set_num_threads(count)
            norms.add(grad_norm(lists, backend="cpu")[0].item())
        torch.set_num_threads(threads)
        assert len(norms) == 1


def two_groups(device, make=AdamW, dtype=torch.float32, **options):
    params = parameters(SMALL, dtype, device)
    groups = [{"params": params[:2], "lr": 1e-2}, {"params": params[2:], "weight_decay": 0.3}]
    return params, make(groups, lr=1e-3, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_spans_groups_and_leaves_gradients_alone(backend):
    params, ours = two_groups(device_of(backend), max_grad_norm=1.0, backend=backend)
    dtypes = torch.float32, torch.float64  # eager, and the truth
    theirs = [two_groups(device_of(backend), torch.optim.AdamW, dtype) for dtype in dtypes]
    for step in range(4):
        grads = drawn(SMALL, step, scale=10.0 ** (step % 2 * 2 - 3))
        for params_, _ in ((params, ours), *theirs):
            for param, grad in zip(params_, grads, strict=True):
                param.grad = grad.to(param)
        ours.step()
        norms = [torch.nn.utils.clip_grad_norm_(others, 1.0) for others, _ in theirs]
        for _, optimizer in theirs:
            optimizer.step()
        assert_no_worse(ours.grad_norm, *norms)
        assert_same_bits([p.grad for p in params], [g.to(params[0]) for g in grads])
    for param, eager, truth in zip(params, *(others for others, _ in theirs), strict=True):
        assert_no_worse(param, eager, truth)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_whose_norm_is_not_finite_changes_nothing(backend, dtype, max_grad_norm):
    params = parameters(SMALL, dtype, device_of(backend))
    optimizer = AdamW(
        params, amsgrad=True, max_grad_norm=max_grad_norm, skip_nonfinite=True, backend=backend
    )

    def step(bad=None):
        for param, grad in zip(params, drawn(SMALL, 5), strict=True):
            param.grad = grad.to(param)
        if bad is not None:
            params[2].grad[-1] = bad
        optimizer.step()

    step()
    before = snapshot(optimizer)
    for bad in (math.nan, math.inf):
        step(bad)
        assert not optimizer.grad_norm.isfinite()
        assert_same_bits(snapshot(optimizer), before)
    expected = copy.deepcopy(optimizer)
    step()
    assert optimizer.state[params[0]]["step"] == 2
    copies = expected.param_groups[0]["params"]
    for param, other in zip(copies, params, strict=True):
        param.grad = other.grad.clone()
    expected.step()
    assert_same_bits(snapshot(optimizer), snapshot(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_to_be_skipped_shows_what_is_wrong(backend):
    """As torch.nn.utils.clip_grad_norm_ does: NaN everywhere, for all to see."""
    params = parameters(SMALL, torch.float32, device_of(backend))
    optimizer = AdamW(params, max_grad_norm=1.0, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad[3] = math.nan
    optimizer.step()
    assert all(param.isnan().all() for param in params)
