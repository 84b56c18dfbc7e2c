"""Where the optimizers' tensors lie: any layout, moved between steps, saved for backward."""

import pytest
import torch
from op_cases import device_of
from optim_cases import (
    MATRICES,
    assert_same_bits,
    close,
    drawn,
    every_backend,
    every_optimizer,
    feed,
    parameters,
    snapshot,
    train,
)

from slimkernels.dispatch import BackendError


@every_optimizer
@every_backend
def test_any_layout(make, backend):
    """Transposed parameters and gradients, slices, memory that begins at odd places."""
    device = device_of(backend)

    def laid_out(layout):
        flat = torch.zeros(64, device=device)
        params = []
        for i, value in enumerate(drawn(MATRICES, 0)):
            value = value.to(device)
            if layout == "transposed" and i != 1:
                value = value.t().contiguous().t()
            elif layout == "odd":
                place = flat[25 * i % 40 + 1 :][: value.numel()]
                value = place.view(value.shape).copy_(value) if i == 1 else value
            elif layout == "gaps":
                rows, columns = value.shape
                value = torch.zeros(rows, 2 * columns, device=device)[:, ::2].copy_(value)
            params.append(torch.nn.Parameter(value))
        return params

    expected = laid_out("dense")
    optimizer = make(expected, lr=0.1, backend=backend)
    train(expected, optimizer, 2)
    for layout in ("transposed", "odd"):
        params = laid_out(layout)
        optimizer = make(params, lr=0.1, backend=backend)
        for seed in range(2):
            feed(params, seed)
            if layout == "odd":
                params[0].grad = params[0].grad.t().contiguous().t()
            optimizer.step()
        close(params, expected, make)
    if backend != "torch":
        params = laid_out("gaps")
        feed(params)
        with pytest.raises(BackendError, match="it reads memory without gaps and param has"):
            make(params, backend=backend).step()
    params = laid_out("gaps")
    train(params, make(params, lr=0.1), 2)
    close(params, expected, make)


@every_optimizer
@every_backend
def test_tensors_that_move_between_steps_are_found(make, backend):
    device = device_of(backend)
    params, expected = (parameters(MATRICES, torch.float32, device) for _ in range(2))
    optimizer, still = make(params, backend=backend), make(expected, backend=backend)
    kept = []  # so that no address comes back
    for seed in range(5):
        feed(params, seed)
        feed(expected, seed)
        kept.append([p.grad for p in params])
        if seed == 2:
            kept.append(params[0].data)
            params[0].data = params[0].data.clone()
        if seed == 3:
            state = optimizer.state[params[1]]
            kept.append(dict(state))
            state.update({key: value.clone() for key, value in state.items()})
        if seed == 4:  # the same memory, read in another order
            for p in (params[2], expected[2]):
                p.grad = p.grad.t()
        optimizer.step()
        still.step()
    assert_same_bits(snapshot(optimizer), snapshot(still))


@every_optimizer
@every_backend
def test_a_step_is_seen_by_autograd(make, backend):
    """What was saved for backward before the step is no longer there: an error, no wrong number."""
    param = torch.nn.Parameter(torch.ones(3, 3, device=device_of(backend)))
    loss = param.square().sum()
    param.grad = torch.ones_like(param)
    make([param], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
