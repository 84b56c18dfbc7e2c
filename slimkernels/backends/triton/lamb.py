"""LAMB (You et al. 2020) over many tensors in Triton.

Tiling    As AdamW's (adamw.py), but in two passes over the chunks of all tensors: the first has the
          norms of w and of u, the second, which makes u anew from m and v, the step. Between them
          one program a tensor adds its chunks' sums up, in order.
Traffic   reads w, g, m, v and writes m, v; then reads w, m, v and writes w: 40 bytes an element in
          float32. To store u would cost two more.
Numerics  float32; sums over a chunk in float32, chunks in float64.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._adam import COLUMNS, begin_step, update_moments
from slimkernels.backends.triton._tensor_lists import (
    BLOCK,
    POINTED,
    chunk_of,
    chunks,
    clipped,
    elements,
    narrow,
    pointer,
    rate,
    read_master,
    read_rate,
    starts,
    sum_of_chunks,
    table,
    unsupported_lists,
    write_master,
)

SUM_BLOCK = 512


def unsupported(lists, clip, lr, betas, eps, weight_decay, maximize):
    return unsupported_lists(lists)


def update(lists, clip, lr, betas, eps, weight_decay, maximize):
    rates = begin_step(lists, clip, 1.0, betas, 0.0)
    addresses, count, (beta1, beta2) = table(lists, COLUMNS), len(lists), betas
    first, total = starts(lists)
    sums = torch.empty((2, total), dtype=torch.float32, device=lists.first.device)
    sizes = torch.empty(count, dtype=torch.float32, device=lists.first.device)
    numbers = (1 - beta1, beta2, 1 - beta2, eps, weight_decay)
    how = dict(
        TYPE=POINTED[lists.first.dtype],
        HAS_MASTER="master" in lists.columns,
        BLOCK=BLOCK,
        num_warps=4,
    )
    launches = chunks(lists, COLUMNS[:-1])
    for is_aligned, cut, number in launches:
        _measure_kernel[(number,)](
            *(addresses, cut, first, rates, clip, sums, *numbers, count, number, total),
            **dict(IS_MAXIMIZED=maximize, IS_ALIGNED=is_aligned, **how),
        )
    _size_kernel[(count,)](sums, first, sizes, *rate(lr), total, BLOCK=SUM_BLOCK, num_warps=4)
    for is_aligned, cut, number in launches:
        _apply_kernel[(number,)](
            *(addresses, cut, rates, clip, sizes, eps, weight_decay, count, number),
            **dict(IS_ALIGNED=is_aligned, **how),
        )


@triton.jit
def _direction(m, v, w, scale, spread, eps, weight_decay):
    """A step before its length is known."""
    return scale * m / (tl.sqrt(v) * spread + eps) + weight_decay * w


@triton.jit
def _squares(w, m, v, scale, spread, eps, weight_decay, mask):
    u = _direction(m, v, w, scale, spread, eps, weight_decay)
    if mask is not None:
        w = tl.where(mask, w, 0.0)
        u = tl.where(mask, u, 0.0)
    return tl.sum(w * w), tl.sum(u * u)


@triton.jit(do_not_specialize=["count", "number", "total"])
def _measure_kernel(
    table_ptr,
    cut_ptr,
    starts_ptr,
    rates_ptr,
    clip_ptr,
    sums_ptr,
    weight1,
    beta2,
    weight2,
    eps,
    weight_decay,
    count,
    number,
    total,
    TYPE: tl.constexpr,
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
    master = pointer(table_ptr, 5, count, tensor, tl.float32, IS_ALIGNED) + at
    scale = tl.load(rates_ptr + count + tensor)
    spread = tl.load(rates_ptr + 2 * count + tensor)
    # A mask, whose edge may be anywhere, would cut the loads to one element each.
    if start + BLOCK <= size:
        m, v = update_moments(grad, exp_avg, exp_avg_sq, None, coefficient, weight1, beta2, weight2)
        w = read_master(param, master, None, HAS_MASTER)
        w_sum, u_sum = _squares(w, m, v, scale, spread, eps, weight_decay, None)
    else:
        mask = at < size
        m, v = update_moments(grad, exp_avg, exp_avg_sq, mask, coefficient, weight1, beta2, weight2)
        w = read_master(param, master, mask, HAS_MASTER)
        w_sum, u_sum = _squares(w, m, v, scale, spread, eps, weight_decay, mask)
    chunk = tl.load(starts_ptr + tensor) + start // BLOCK
    tl.store(sums_ptr + chunk, w_sum)
    tl.store(sums_ptr + total + chunk, u_sum)


@triton.jit(do_not_specialize=["total"])
def _size_kernel(sums_ptr, starts_ptr, sizes_ptr, lr_ptr, lr, total, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    w = tl.sqrt(sum_of_chunks(sums_ptr, starts_ptr, tensor, BLOCK))
    u = tl.sqrt(sum_of_chunks(sums_ptr + total, starts_ptr, tensor, BLOCK))
    ratio = tl.where((w > 0.0) & (u > 0.0), w / u, 1.0)
    tl.store(sizes_ptr + tensor, (ratio * read_rate(lr_ptr, lr)).to(tl.float32))


@triton.jit(do_not_specialize=["count", "number"])
def _apply_kernel(
    table_ptr,
    cut_ptr,
    rates_ptr,
    clip_ptr,
    sizes_ptr,
    eps,
    weight_decay,
    count,
    number,
    TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = chunk_of(table_ptr, cut_ptr, 7, count, number, BLOCK)
    _, size = clipped(clip_ptr, size, False)
    at = elements(start, BLOCK)
    param = pointer(table_ptr, 0, count, tensor, TYPE, IS_ALIGNED) + at
    exp_avg = pointer(table_ptr, 2, count, tensor, tl.float32, IS_ALIGNED) + at
    exp_avg_sq = pointer(table_ptr, 3, count, tensor, tl.float32, IS_ALIGNED) + at
    master = pointer(table_ptr, 5, count, tensor, tl.float32, IS_ALIGNED) + at
    scale = tl.load(rates_ptr + count + tensor)
    spread = tl.load(rates_ptr + 2 * count + tensor)
    step = tl.load(sizes_ptr + tensor)
    if start + BLOCK <= size:
        w = read_master(param, master, None, HAS_MASTER)
        u = _direction(tl.load(exp_avg), tl.load(exp_avg_sq), w, scale, spread, eps, weight_decay)
        write_master(param, master, w - step * u, None, HAS_MASTER)
    else:
        mask = at < size
        w = read_master(param, master, mask, HAS_MASTER)
        m = tl.load(exp_avg, mask=mask)
        v = tl.load(exp_avg_sq, mask=mask)
        u = _direction(m, v, w, scale, spread, eps, weight_decay)
        write_master(param, master, w - step * u, mask, HAS_MASTER)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict(table_ptr="*i64", cut_ptr="*i32", starts_ptr="*i32", rates_ptr="*fp32"),
    **dict.fromkeys(("clip_ptr", "sums_ptr", "sizes_ptr", "lr_ptr"), "*fp32"),
    **dict.fromkeys(("weight1", "beta2", "weight2", "eps", "weight_decay", "lr"), "fp32"),
    **dict.fromkeys(("count", "number", "total"), "i32/1"),
}
COMPILES = [
    dict(
        kernel=kernel,
        signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
        constexprs=dict(
            TYPE=kind,
            HAS_MASTER=kind != tl.float32,
            IS_ALIGNED=is_aligned,
            BLOCK=BLOCK,
            **({"IS_MAXIMIZED": False} if kernel is _measure_kernel else {}),
        ),
        num_warps=4,
        registers=64,
        narrow=narrow(*instructions),
    )
    for kernel, kind, is_aligned, *instructions in (
        (_measure_kernel, tl.float32, True, 32, 16),
        (_measure_kernel, tl.bfloat16, True, 44, 16),
        (_measure_kernel, tl.bfloat16, False, 80, 32),
        (_apply_kernel, tl.float32, True, 24, 8),
        (_apply_kernel, tl.bfloat16, True, 34, 18),
        (_apply_kernel, tl.bfloat16, False, 64, 32),
    )
] + [
    dict(
        kernel=_size_kernel,
        signature={name: t for name, t in _TYPES.items() if name in _size_kernel.arg_names},
        constexprs=dict(BLOCK=SUM_BLOCK),
        num_warps=4,
        registers=64,
        narrow=dict(load=56, why="a tensor's sums begin anywhere among those of all"),
    )
]
