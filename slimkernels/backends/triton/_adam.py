"""What AdamW and LAMB share: their tensors, the steps counted, and the moments of the gradient."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends._tensor_lists import TensorLists
from slimkernels.backends.triton._tensor_lists import clipped, rate, read_rate, table

COLUMNS = ("param", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master", "step")
RATES = 3  # of a tensor: decay, step size, 1 / sqrt(bias correction of v)
BEGIN_BLOCK = 128


def begin_step(
    lists: TensorLists,
    clip: Tensor | None,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
) -> Tensor:
    """Count the step of each tensor; (RATES, tensors) float32."""
    count = len(lists)
    rates = torch.empty((RATES, count), dtype=torch.float32, device=lists.first.device)
    logs = (math.log(beta) if beta else -math.inf for beta in betas)
    begin_kernel[(triton.cdiv(count, BEGIN_BLOCK),)](
        *(table(lists, COLUMNS), rates, clip, *rate(lr), *logs, weight_decay, count),
        **dict(BLOCK=BEGIN_BLOCK, num_warps=4),
    )
    return rates


@triton.jit(do_not_specialize=["count"])
def begin_kernel(
    table_ptr,
    rates_ptr,
    clip_ptr,
    lr_ptr,
    lr,
    log_beta1,
    log_beta2,
    weight_decay,
    count,
    BLOCK: tl.constexpr,
):
    tensors = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, end = clipped(clip_ptr, count, False)
    mask = tensors < end
    counters = tl.load(table_ptr + 6 * count + tensors, mask=mask, other=0)
    counters = counters.to(tl.pointer_type(tl.float32))
    step = tl.load(counters, mask=mask, other=0.0) + 1.0
    tl.store(counters, step, mask=mask)

    one = tl.full((BLOCK,), 1.0, tl.float64)
    rate = one * read_rate(lr_ptr, lr)
    size = rate / (1.0 - tl.exp(step.to(tl.float64) * log_beta1))
    spread = 1.0 - tl.exp(step.to(tl.float64) * log_beta2)
    decay = 1.0 - rate * weight_decay
    tl.store(rates_ptr + tensors, decay.to(tl.float32), mask=mask)
    tl.store(rates_ptr + count + tensors, size.to(tl.float32), mask=mask)
    tl.store(rates_ptr + 2 * count + tensors, (1.0 / tl.sqrt(spread)).to(tl.float32), mask=mask)


@triton.jit
def update_moments(grad, exp_avg, exp_avg_sq, mask, coefficient, weight1, beta2, weight2):
    """m += (1 - b1) (g - m) and v = b2 v + (1 - b2) g^2, written and returned."""
    g = tl.load(grad, mask=mask).to(tl.float32) * coefficient
    m = tl.load(exp_avg, mask=mask)
    m += weight1 * (g - m)
    v = tl.load(exp_avg_sq, mask=mask) * beta2 + weight2 * (g * g)
    tl.store(exp_avg, m, mask=mask)
    tl.store(exp_avg_sq, v, mask=mask)
    return m, v
