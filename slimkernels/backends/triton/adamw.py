"""AdamW (Loshchilov, Hutter 2019) over many tensors in Triton.

Tiling    A program owns a chunk of one tensor, found in a table (_tensor_lists.py); one launch for
          all tensors. Before it one program counts the steps and computes each tensor's rates.
Traffic   reads w, g, m, v and writes w, m, v once: 28 bytes an element in float32.
Numerics  float32; the bias corrections 1 - beta^step, which cancel, are float64. A bfloat16
          parameter is the rounded copy of its float32 master, written in the same pass.
Launch    Whether the step is taken at all is read on the device, and no number that may change
          from step to step is compiled in: a CUDA graph can hold the launches.
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._adam import (
    BEGIN_BLOCK,
    COLUMNS,
    begin_kernel,
    begin_step,
    update_moments,
)
from slimkernels.backends.triton._tensor_lists import (
    BLOCK,
    POINTED,
    chunk_of,
    chunks,
    clipped,
    elements,
    narrow,
    pointer,
    read_master,
    table,
    unsupported_lists,
    write_master,
)


def unsupported(lists, clip, lr, betas, eps, weight_decay, maximize):
    return unsupported_lists(lists)


def update(lists, clip, lr, betas, eps, weight_decay, maximize):
    rates = begin_step(lists, clip, lr, betas, weight_decay)
    addresses, count, (beta1, beta2) = table(lists, COLUMNS), len(lists), betas
    numbers = (1 - beta1, beta2, 1 - beta2, eps)
    for is_aligned, cut, number in chunks(lists, COLUMNS[:-1]):
        _update_kernel[(number,)](
            *(addresses, cut, rates, clip, *numbers, count, number),
            TYPE=POINTED[lists.first.dtype],
            HAS_MAXIMUM="max_exp_avg_sq" in lists.columns,
            HAS_MASTER="master" in lists.columns,
            IS_MAXIMIZED=maximize,
            IS_ALIGNED=is_aligned,
            BLOCK=BLOCK,
            num_warps=4,
        )


@triton.jit
def _update_block(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    master,
    mask,
    coefficient,
    weight1,
    beta2,
    weight2,
    eps,
    decay,
    size,
    spread,
    HAS_MAXIMUM: tl.constexpr,
    HAS_MASTER: tl.constexpr,
):
    """One chunk, given the addresses of its elements; mask None where it is whole."""
    m, v = update_moments(grad, exp_avg, exp_avg_sq, mask, coefficient, weight1, beta2, weight2)
    if HAS_MAXIMUM:
        v = tl.maximum(tl.load(max_exp_avg_sq, mask=mask), v, tl.PropagateNan.ALL)
        tl.store(max_exp_avg_sq, v, mask=mask)
    w = read_master(param, master, mask, HAS_MASTER)
    w = w * decay - size * (m / (tl.sqrt(v) * spread + eps))
    write_master(param, master, w, mask, HAS_MASTER)


@triton.jit(do_not_specialize=["count", "number"])
def _update_kernel(
    table_ptr,
    cut_ptr,
    rates_ptr,
    clip_ptr,
    weight1,
    beta2,
    weight2,
    eps,
    count,
    number,
    TYPE: tl.constexpr,
    HAS_MAXIMUM: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    IS_MAXIMIZED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = chunk_of(table_ptr, cut_ptr, 7, count, number, BLOCK)
    coefficient, size = clipped(clip_ptr, size, IS_MAXIMIZED)
    at = elements(start, BLOCK)
    param = pointer(table_ptr, 0, count, tensor, TYPE, IS_ALIGNED) + at
    grad = pointer(table_ptr, 1, count, tensor, TYPE, IS_ALIGNED) + at
    exp_avg = pointer(table_ptr, 2, count, tensor, tl.float32, IS_ALIGNED) + at
    exp_avg_sq = pointer(table_ptr, 3, count, tensor, tl.float32, IS_ALIGNED) + at
    max_exp_avg_sq = pointer(table_ptr, 4, count, tensor, tl.float32, IS_ALIGNED) + at
    master = pointer(table_ptr, 5, count, tensor, tl.float32, IS_ALIGNED) + at
    decay = tl.load(rates_ptr + tensor)
    step_size = tl.load(rates_ptr + count + tensor)
    spread = tl.load(rates_ptr + 2 * count + tensor)
    # A mask, whose edge may be anywhere, would cut the loads to one element each.
    if start + BLOCK <= size:
        _update_block(
            *(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, None),
            *(coefficient, weight1, beta2, weight2, eps, decay, step_size, spread),
            *(HAS_MAXIMUM, HAS_MASTER),
        )
    else:
        _update_block(
            *(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, master, at < size),
            *(coefficient, weight1, beta2, weight2, eps, decay, step_size, spread),
            *(HAS_MAXIMUM, HAS_MASTER),
        )


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
COMPILES = [
    dict(
        kernel=begin_kernel,
        signature={
            **dict(table_ptr="*i64", rates_ptr="*fp32", clip_ptr="*fp32", lr_ptr="*fp32"),
            **dict.fromkeys(("lr", "log_beta1", "log_beta2", "weight_decay"), "fp32"),
            "count": "i32/1",
        },
        constexprs={"BLOCK": BEGIN_BLOCK},
        num_warps=4,
        registers=64,
        narrow=dict(why="a few numbers a tensor"),
    )
] + [
    dict(
        kernel=_update_kernel,
        signature={
            **dict(table_ptr="*i64", cut_ptr="*i32", rates_ptr="*fp32", clip_ptr="*fp32"),
            **dict.fromkeys(("weight1", "beta2", "weight2", "eps"), "fp32"),
            **dict.fromkeys(("count", "number"), "i32/1"),
        },
        constexprs=dict(
            TYPE=kind,
            HAS_MAXIMUM=has_maximum,
            HAS_MASTER=has_maximum,
            IS_MAXIMIZED=False,
            IS_ALIGNED=is_aligned,
            BLOCK=BLOCK,
        ),
        num_warps=4,
        registers=64,
        narrow=narrow(*instructions),
    )
    for kind, has_maximum, is_aligned, *instructions in (
        (tl.float32, False, True, 32, 24),
        (tl.float32, False, False, 64, 48),
        (tl.bfloat16, True, True, 52, 42),
        (tl.bfloat16, True, False, 96, 80),
    )
]
