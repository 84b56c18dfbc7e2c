"""Rows looked up in up to three tables, their sum, its LayerNorm and dropout, in Triton.

Tiling    A program gathers the parts of a row in registers. In backward a few programs per
          multiprocessor stride over the rows, as in layer_norm.py. The tables' gradients:
          _table_gradient.py.
Traffic   Forward reads N elements a row for each table and writes N; small tables stay in the
          cache. The sum is not stored: writing and reading it would be 2 N elements a row, looking
          its parts up again is N from the large table. Backward reads dy and the parts, writes
          dsum. Dropout stores nothing: backward draws its bits again. The roof is DRAM bandwidth.
Numerics  float32 up to y, which is rounded once, and so is dsum. The rest as in layer_norm.py.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from slimkernels.backends._embedding import widest
from slimkernels.backends.triton import _table_gradient
from slimkernels.backends.triton._common import dense, row_block, unsupported_tensor
from slimkernels.backends.triton._residual import (
    backward_block,
    drop_and_scale,
    dropout_numbers,
    longest_row,
)
from slimkernels.backends.triton._rows import (
    MAX_ROW,
    empty_partials,
    load_weight,
    normalize,
    normalize_backward,
    parameter_gradients,
    scale_and_shift,
)


class Lookup(NamedTuple):
    """Pointers to the rows' ids and to the table that they index, and how many rows that has."""

    ids: Any
    table: Any
    count: Any


def unsupported(
    ids,
    weight,
    position_ids,
    position_weight,
    segment_ids,
    segment_weight,
    norm_weight,
    norm_bias,
    padding_idx,
    eps,
    dropout_p,
):
    N, longest = weight.shape[1], longest_row(widest(weight, position_weight, segment_weight))
    if eps is not None and longest < N:
        return f"a row to be normalised may have {longest} elements, and weight has {N} columns"
    return unsupported_tensor(weight, "weight")


def _lookups(ids, weight, position_ids, position_weight, segment_ids, segment_weight):
    pairs = (ids, weight), (position_ids, position_weight), (segment_ids, segment_weight)
    return [
        None if table is None else Lookup(ids.contiguous(), table.contiguous(), table.shape[0])
        for ids, table in pairs
    ]


def forward(
    ids,
    weight,
    position_ids,
    position_weight,
    segment_ids,
    segment_weight,
    norm_weight,
    norm_bias,
    padding_idx,
    eps,
    dropout_p,
    seed,
):
    lookups = _lookups(ids, weight, position_ids, position_weight, segment_ids, segment_weight)
    M, N = ids.numel(), weight.shape[1]
    y = weight.new_empty((*ids.shape, N))
    mean = weight.new_empty(ids.shape if eps is not None else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    moments = (mean, rstd) if eps is not None else (None, None)
    if M:
        BLOCK_N, num_warps = row_block(min(N, MAX_ROW))
        _forward_kernel[(M, triton.cdiv(N, BLOCK_N))](
            *(*lookups, dense(norm_weight), dense(norm_bias), y, *moments, seed),
            *(N, eps or 0.0, *dropout_numbers(dropout_p)),
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return y, mean, rstd


@triton.jit
def _part(lookup, row, cols, mask, N):
    """What a row looks up: NaN, and nothing read, where its id lies outside the table."""
    # A block of one: Triton's interpreter masks with blocks only.
    id = tl.load(lookup.ids + row).to(tl.int64) + tl.zeros((1,), tl.int64)
    known = (id >= 0) & (id < lookup.count)
    x = tl.load(lookup.table + id * N + cols, mask=mask & known, other=0.0).to(tl.float32)
    return tl.where(mask & (known == 0), float("nan"), x)


@triton.jit
def _sum(tokens, positions, segments, row, cols, mask, N):
    total = _part(tokens, row, cols, mask, N)
    if positions is not None:
        total += _part(positions, row, cols, mask, N)
    if segments is not None:
        total += _part(segments, row, cols, mask, N)
    return total


@triton.jit(do_not_specialize=["threshold"])
def _forward_kernel(
    tokens,
    positions,
    segments,
    norm_weight_ptr,
    norm_bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    N,
    eps,
    threshold,
    scale,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * N can pass 2^31
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    y = _sum(tokens, positions, segments, row, cols, mask, N)
    if mean_ptr is not None:  # else a row may have several programs
        xhat, mean, rstd = normalize(y, mask, N, eps)
        y = scale_and_shift(xhat, norm_weight_ptr, norm_bias_ptr, cols, mask, False)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    y = drop_and_scale(y, seed_ptr, None, row, cols, threshold, scale)
    tl.store(y_ptr + row * N + cols, y, mask=mask)


def backward(
    dy,
    ids,
    weight,
    position_ids,
    position_weight,
    segment_ids,
    segment_weight,
    norm_weight,
    norm_bias,
    mean,
    rstd,
    dropout_p,
    seed,
):
    lookups = _lookups(ids, weight, position_ids, position_weight, segment_ids, segment_weight)
    dy = dy.contiguous()
    M, N = ids.numel(), weight.shape[1]
    dtype = widest(weight, position_weight, segment_weight)
    dsum = torch.empty_like(dy, dtype=dtype)
    programs, partials = empty_partials(dy, M, norm_weight, norm_bias)
    if M:
        BLOCK_N, num_warps = backward_block(N, dtype)
        _backward_kernel[(programs,)](
            *(dy, *lookups, dense(norm_weight), mean, rstd, dsum, *partials, seed),
            *(M, N, *dropout_numbers(dropout_p)),
            BLOCK_N=BLOCK_N,
            num_warps=num_warps,
        )
    return dsum, *parameter_gradients(partials, dy, norm_weight, norm_bias)


@triton.jit(do_not_specialize=["threshold"])
def _backward_kernel(
    dy_ptr,
    tokens,
    positions,
    segments,
    norm_weight_ptr,
    mean_ptr,
    rstd_ptr,
    dsum_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    seed_ptr,
    M,
    N,
    threshold,
    scale,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    mask = cols < N
    weight = load_weight(norm_weight_ptr, cols, mask, False)
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)

    for row in range(program, M, tl.num_programs(0)):
        total = _sum(tokens, positions, segments, row, cols, mask, N)
        dy = tl.load(dy_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
        dy = drop_and_scale(dy, seed_ptr, None, row, cols, threshold, scale)
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        dsum, xhat = normalize_backward(dy, total, weight, mean, rstd, mask, N)
        tl.store(dsum_ptr + row * N + cols, dsum, mask=mask)
        if dnorm_weight_ptr is not None:
            dweight += dy * xhat
        if dnorm_bias_ptr is not None:
            dbias += dy

    if dnorm_weight_ptr is not None:
        tl.store(dnorm_weight_ptr + program * N + cols, dweight, mask=mask)
    if dnorm_bias_ptr is not None:
        tl.store(dnorm_bias_ptr + program * N + cols, dbias, mask=mask)


def table_backward(dsum, ids, rows, dtype, padding_idx):
    return _table_gradient.table_gradient(dsum, ids, rows, dtype, padding_idx)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
def _compiles():
    for narrow, wide in (("*bf16", "*bf16"), ("*fp32", "*fp32"), ("*bf16", "*fp32")):
        types = {
            "tokens": Lookup("*i64", narrow, "i32"),
            **dict.fromkeys(("positions", "segments"), Lookup("*i64", wide, "i32")),
            **dict.fromkeys(("dy_ptr", "y_ptr", "norm_weight_ptr", "norm_bias_ptr"), narrow),
            **dict.fromkeys(
                ("mean_ptr", "rstd_ptr", "dnorm_weight_ptr", "dnorm_bias_ptr"), "*fp32"
            ),
            **{"dsum_ptr": wide, "seed_ptr": "*i64"},
            **dict.fromkeys(("M", "N", "threshold"), "i32"),
            **dict.fromkeys(("eps", "scale"), "fp32"),
        }
        dtype = torch.bfloat16 if wide == "*bf16" else torch.float32
        for kernel, block in (
            (_forward_kernel, row_block),
            (_backward_kernel, lambda N, dtype=dtype: backward_block(N, dtype)),
        ):
            for N in (1024, longest_row(dtype)):  # 768 takes the block of 1024, too
                yield dict(
                    kernel=kernel,
                    signature={n: t for n, t in types.items() if n in kernel.arg_names},
                    constexprs={"BLOCK_N": block(N)[0]},
                    num_warps=block(N)[1],
                    registers=128 if N == 1024 else 255,
                )


COMPILES = [*_compiles(), *_table_gradient.COMPILES]
