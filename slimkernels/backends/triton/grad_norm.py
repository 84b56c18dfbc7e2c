"""The norm of many gradients in Triton.

Tiling    Programs stride over the chunks of all tensors (_tensor_lists.py) and add up squares; one
          program then adds the programs' sums. Their number depends on the device alone: the same
          bits on every run.
Traffic   reads each gradient once.
Numerics  float32 in a lane, float64 among programs. Squares overflow beyond 1.8e19, as torch's do.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._tensor_lists import (
    BLOCK,
    POINTED,
    chunks,
    narrow,
    pointer,
    programs,
    table,
    unsupported_lists,
)

FINISH_BLOCK = 1024


def unsupported(lists, max_norm, skip_nonfinite):
    return next(filter(None, map(unsupported_lists, lists)), None)


def update(lists, max_norm, skip_nonfinite):
    launches = [(each, *launch) for each in lists for launch in chunks(each, ("grad",))]
    counts = [programs(each, number) for each, _, _, number in launches]
    device = lists[0].first.device
    sums = torch.empty(sum(counts), dtype=torch.float32, device=device)
    for (each, is_aligned, cut, number), part in zip(launches, sums.split(counts), strict=True):
        _square_kernel[(len(part),)](
            *(table(each, ("grad",)), cut, part, len(each), number, len(part)),
            TYPE=POINTED[each.first.dtype],
            **dict(IS_ALIGNED=is_aligned, BLOCK=BLOCK, num_warps=4),
        )
    clip = torch.empty(3, dtype=torch.float32, device=device)
    _finish_kernel[(1,)](
        *(sums, clip, max_norm or 0.0, len(sums)),
        **dict(HAS_LIMIT=max_norm is not None, IS_SKIPPING=skip_nonfinite),
        **dict(BLOCK=FINISH_BLOCK, num_warps=4),
    )
    return clip


@triton.jit(do_not_specialize=["count", "number", "P"])
def _square_kernel(
    table_ptr,
    cut_ptr,
    sums_ptr,
    count,
    number,
    P,
    TYPE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(tl.program_id(0), number, P):
        tensor = tl.load(cut_ptr + chunk)
        start = tl.load(cut_ptr + number + chunk).to(tl.int64) * BLOCK
        size = tl.load(table_ptr + count + tensor)
        at = start + tl.arange(0, BLOCK)
        grad = pointer(table_ptr, 0, count, tensor, TYPE, IS_ALIGNED) + at
        # A mask, whose edge may be anywhere, would cut the loads to one element each.
        if start + BLOCK <= size:
            g = tl.load(grad).to(tl.float32)
        else:
            g = tl.load(grad, mask=at < size, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["P"])
def _finish_kernel(
    sums_ptr,
    clip_ptr,
    max_norm,
    P,
    HAS_LIMIT: tl.constexpr,
    IS_SKIPPING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, P, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, mask=at < P, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total))
    tl.store(clip_ptr, norm.to(tl.float32))
    coefficient = 1.0
    if HAS_LIMIT:
        ratio = (max_norm / (norm + 1e-6)).to(tl.float32)
        coefficient = tl.where(ratio > 1.0, 1.0, ratio)  # NaN stays
    tl.store(clip_ptr + 1, coefficient)
    applies = 1.0
    if IS_SKIPPING:
        # False for NaN, too.
        applies = tl.where(norm < float("inf"), 1.0, 0.0)
    tl.store(clip_ptr + 2, applies)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
COMPILES = [
    dict(
        kernel=_square_kernel,
        signature={
            **dict(table_ptr="*i64", cut_ptr="*i32", sums_ptr="*fp32"),
            **dict.fromkeys(("count", "number", "P"), "i32/1"),
        },
        constexprs=dict(TYPE=kind, IS_ALIGNED=True, BLOCK=BLOCK),
        num_warps=4,
        registers=64,
        narrow=narrow(8),
    )
    for kind in (tl.float32, tl.bfloat16)
] + [
    dict(
        kernel=_finish_kernel,
        signature=dict(sums_ptr="*fp32", clip_ptr="*fp32", max_norm="fp32", P="i32/1"),
        constexprs=dict(HAS_LIMIT=True, IS_SKIPPING=True, BLOCK=FINISH_BLOCK),
        num_warps=4,
        registers=64,
        narrow=dict(load=8, why="the programs' sums, a few hundred, are of any number"),
    )
]
