"""Muon (Jordan 2024) over many matrices in Triton; the products between are torch's.

Tiling    Chunks of all tensors (_tensor_lists.py) in three passes: momenta and sums of squares;
          directions, once a program a tensor has added those sums up, in order; parameters.
Traffic   reads g, b and writes b; reads g, b and writes x; reads w, x and writes w. To store d for
          the second pass in bfloat16 would round it twice.
Numerics  float32; sums over a chunk in float32, chunks in float64. x is bfloat16, rounded once.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends._muon import orthogonalize, plan, ratios
from slimkernels.backends.triton._tensor_lists import (
    BLOCK,
    POINTED,
    chunk_of,
    chunks,
    clipped,
    elements,
    factors,
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

COLUMNS = ("param", "grad", "momentum_buffer", "master")  # then each direction's place
SUM_BLOCK = 512


def unsupported(
    lists,
    clip,
    lr,
    weight_decay,
    momentum,
    nesterov,
    ns_coefficients,
    eps,
    ns_steps,
    adjust_lr_fn,
):
    return unsupported_lists(lists)


def update(
    lists,
    clip,
    lr,
    weight_decay,
    momentum,
    nesterov,
    ns_coefficients,
    eps,
    ns_steps,
    adjust_lr_fn,
):
    where, count, device = plan(lists), len(lists), lists.first.device
    rows, (first, total) = table(lists, COLUMNS, where.places), starts(lists)
    sums = torch.empty(total, dtype=torch.float32, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    directions = torch.empty(where.total, dtype=torch.bfloat16, device=device)
    launches = chunks(lists, COLUMNS)
    how = dict(TYPE=POINTED[lists.first.dtype], BLOCK=BLOCK, num_warps=4)
    numbers = (1 - momentum, momentum, count)
    for is_aligned, cut, number in launches:
        _momentum_kernel[(number,)](
            *(rows, cut, first, clip, sums, *numbers, number),
            **dict(IS_NESTEROV=nesterov, IS_ALIGNED=is_aligned, **how),
        )
    _scale_kernel[(count,)](sums, first, scales, eps, BLOCK=SUM_BLOCK, num_warps=4)
    for is_aligned, cut, number in launches:
        _direction_kernel[(number,)](
            *(rows, cut, clip, scales, directions, momentum, count, number),
            **dict(IS_NESTEROV=nesterov, IS_ALIGNED=is_aligned, **how),
        )
    directions = orthogonalize(directions, where.stacks, ns_coefficients, ns_steps)
    of_lr = factors(lists, ("ratios", adjust_lr_fn), ratios(lists, adjust_lr_fn))
    for is_aligned, cut, number in launches:
        _apply_kernel[(number,)](
            *(rows, cut, clip, of_lr, directions, *rate(lr), weight_decay, count, number),
            **dict(HAS_MASTER="master" in lists.columns, IS_ALIGNED=is_aligned, **how),
        )


@triton.jit
def _direction(g, b, momentum, IS_NESTEROV: tl.constexpr):
    if IS_NESTEROV:
        b = g + momentum * (b - g)
    return b


@triton.jit
def _accelerate(grad, buffer, mask, coefficient, weight, momentum, IS_NESTEROV: tl.constexpr):
    """The new momenta, written; the directions."""
    g = tl.load(grad, mask=mask).to(tl.float32) * coefficient
    b = tl.load(buffer, mask=mask)
    b += weight * (g - b)
    tl.store(buffer, b, mask=mask)
    return _direction(g, b, momentum, IS_NESTEROV)


@triton.jit(do_not_specialize=["count", "number"])
def _momentum_kernel(
    table_ptr,
    cut_ptr,
    starts_ptr,
    clip_ptr,
    sums_ptr,
    weight,
    momentum,
    count,
    number,
    TYPE: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = chunk_of(table_ptr, cut_ptr, 5, count, number, BLOCK)
    coefficient, size = clipped(clip_ptr, size, False)
    at = elements(start, BLOCK)
    grad = pointer(table_ptr, 1, count, tensor, TYPE, IS_ALIGNED) + at
    buffer = pointer(table_ptr, 2, count, tensor, tl.float32, IS_ALIGNED) + at
    # A mask, whose edge may be anywhere, would cut the loads to one element each.
    if start + BLOCK <= size:
        d = _accelerate(grad, buffer, None, coefficient, weight, momentum, IS_NESTEROV)
    else:
        mask = at < size
        d = _accelerate(grad, buffer, mask, coefficient, weight, momentum, IS_NESTEROV)
        d = tl.where(mask, d, 0.0)
    tl.store(sums_ptr + tl.load(starts_ptr + tensor) + start // BLOCK, tl.sum(d * d))


@triton.jit
def _scale_kernel(sums_ptr, starts_ptr, scales_ptr, eps, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    norm = tl.sqrt(sum_of_chunks(sums_ptr, starts_ptr, tensor, BLOCK))
    norm = tl.where(norm < eps, eps, norm)  # NaN stays
    tl.store(scales_ptr + tensor, (1.0 / norm).to(tl.float32))


@triton.jit(do_not_specialize=["count", "number"])
def _direction_kernel(
    table_ptr,
    cut_ptr,
    clip_ptr,
    scales_ptr,
    directions_ptr,
    momentum,
    count,
    number,
    TYPE: tl.constexpr,
    IS_NESTEROV: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = chunk_of(table_ptr, cut_ptr, 5, count, number, BLOCK)
    coefficient, _ = clipped(clip_ptr, size, False)
    at = elements(start, BLOCK)
    grad = pointer(table_ptr, 1, count, tensor, TYPE, IS_ALIGNED) + at
    buffer = pointer(table_ptr, 2, count, tensor, tl.float32, IS_ALIGNED) + at
    place = tl.multiple_of(tl.load(table_ptr + 4 * count + tensor), 8)
    scale = tl.load(scales_ptr + tensor)
    if start + BLOCK <= size:
        g = tl.load(grad).to(tl.float32) * coefficient
        d = _direction(g, tl.load(buffer), momentum, IS_NESTEROV)
        tl.store(directions_ptr + place + at, (d * scale).to(tl.bfloat16))
    else:
        mask = at < size
        g = tl.load(grad, mask=mask).to(tl.float32) * coefficient
        d = _direction(g, tl.load(buffer, mask=mask), momentum, IS_NESTEROV)
        tl.store(directions_ptr + place + at, (d * scale).to(tl.bfloat16), mask=mask)


@triton.jit
def _apply_block(param, master, x, mask, decay, size, HAS_MASTER: tl.constexpr):
    w = read_master(param, master, mask, HAS_MASTER)
    w = w * decay - size * tl.load(x, mask=mask).to(tl.float32)
    write_master(param, master, w, mask, HAS_MASTER)


@triton.jit(do_not_specialize=["count", "number"])
def _apply_kernel(
    table_ptr,
    cut_ptr,
    clip_ptr,
    ratios_ptr,
    directions_ptr,
    lr_ptr,
    lr,
    weight_decay,
    count,
    number,
    TYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = chunk_of(table_ptr, cut_ptr, 5, count, number, BLOCK)
    _, size = clipped(clip_ptr, size, False)
    at = elements(start, BLOCK)
    param = pointer(table_ptr, 0, count, tensor, TYPE, IS_ALIGNED) + at
    master = pointer(table_ptr, 3, count, tensor, tl.float32, IS_ALIGNED) + at
    place = tl.load(table_ptr + 4 * count + tensor)
    if IS_ALIGNED:  # else wide loads of x alone would cost an exchange of registers
        place = tl.multiple_of(place, 8)
    x = directions_ptr + place + at
    rate = read_rate(lr_ptr, lr)
    decay = 1.0 - rate * weight_decay
    step_size = rate * tl.load(ratios_ptr + tensor)
    if start + BLOCK <= size:
        _apply_block(param, master, x, None, decay, step_size, HAS_MASTER)
    else:
        _apply_block(param, master, x, at < size, decay, step_size, HAS_MASTER)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict(table_ptr="*i64", cut_ptr="*i32", starts_ptr="*i32", directions_ptr="*bf16"),
    **dict.fromkeys(("clip_ptr", "sums_ptr", "scales_ptr", "ratios_ptr", "lr_ptr"), "*fp32"),
    **dict.fromkeys(("weight", "momentum", "lr", "weight_decay", "eps"), "fp32"),
    **dict.fromkeys(("count", "number"), "i32/1"),
}
COMPILES = [
    dict(
        kernel=kernel,
        signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
        constexprs={
            name: value
            for name, value in dict(
                TYPE=kind,
                IS_NESTEROV=True,
                HAS_MASTER=kind != tl.float32,
                IS_ALIGNED=is_aligned,
                BLOCK=BLOCK,
            ).items()
            if name in kernel.arg_names
        },
        num_warps=4,
        registers=64,
        narrow=narrow(*instructions),
    )
    for kernel, kind, is_aligned, *instructions in (
        (_momentum_kernel, tl.float32, True, 16, 8),
        (_momentum_kernel, tl.bfloat16, False, 32, 16),
        (_direction_kernel, tl.float32, True, 16, 10),
        (_direction_kernel, tl.bfloat16, False, 32, 10),
        (_apply_kernel, tl.float32, True, 18, 8),
        (_apply_kernel, tl.bfloat16, False, 48, 32),
    )
] + [
    dict(
        kernel=_scale_kernel,
        signature={name: t for name, t in _TYPES.items() if name in _scale_kernel.arg_names},
        constexprs=dict(BLOCK=SUM_BLOCK),
        num_warps=4,
        registers=64,
        narrow=dict(load=28, why="a tensor's sums begin anywhere among those of all"),
    )
]
