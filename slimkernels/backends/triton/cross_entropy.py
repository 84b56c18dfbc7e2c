"""Cross-entropy of logits (M, V) with class labels in Triton.

Tiling    Forward: a program owns one part of one row and walks it in blocks; few rows are cut into
          more parts, so that the whole GPU reads. A second kernel merges the parts of many rows, a
          third adds the rows up, in one program: the same bits on every run, and no atomics.
          Backward: one program a block of a row.
Traffic   forward reads the logits once, backward reads them once and writes dx once; ignored rows
          are not read. The roof is DRAM bandwidth, 3 * M * V * itemsize bytes in all.
Numerics  online: a running maximum, the sum of exp(x - maximum), and for smoothing the sum of
          maximum - x, rescaled when the maximum rises. lse stays in two float32, the maximum and
          the logarithm of the sum: in one it would be wrong by 5e-4 at logits of 1e4.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._common import row_programs, unsupported_tensor

MAX_BLOCK = 4096
ROWS = 128  # that one program of the second kernel finishes
SUMMED = 2048  # rows that the third adds at once


def unsupported(x, target, ignore_index, reduction, label_smoothing):
    return unsupported_tensor(x)


def forward(x, target, ignore_index, reduction, label_smoothing):
    x, target = x.contiguous(), target.contiguous()
    M, V = x.shape
    losses = x.new_empty(M, dtype=torch.float32 if reduction != "none" else x.dtype)
    lse = x.new_empty((2, M), dtype=torch.float32)
    total = x.new_empty(())
    count = x.new_empty(1, dtype=torch.float32)
    if M:
        BLOCK_V, num_warps = _block(V)
        blocks = triton.cdiv(V, BLOCK_V)
        parts = triton.cdiv(row_programs(x, 1 << 30), M)
        per_part = triton.cdiv(blocks, min(parts, blocks)) * BLOCK_V
        parts = triton.cdiv(V, per_part)
        partials = x.new_empty((M, parts, 3), dtype=torch.float32)
        _parts_kernel[(M * parts,)](
            *(x, target, partials, V, parts, per_part, ignore_index),
            SMOOTH=label_smoothing > 0,
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )
        _finish_kernel[(triton.cdiv(M, ROWS),)](
            *(x, target, partials, losses, lse, M, V, parts, per_part),
            *(ignore_index, label_smoothing),
            SMOOTH=label_smoothing > 0,
            ROWS=ROWS,
            num_warps=ROWS // 32,
        )
    if reduction == "none":
        return losses, lse, count
    _total_kernel[(1,)](
        *(losses, target, total, count, M, ignore_index),
        IS_MEAN=reduction == "mean",
        BLOCK_M=min(max(triton.next_power_of_2(M), 16), SUMMED),
    )
    return total, lse, count


def backward(dy, x, target, lse, count, ignore_index, reduction, label_smoothing):
    dy, x, target = dy.contiguous(), x.contiguous(), target.contiguous()
    M, V = x.shape
    dx = torch.empty_like(x)
    if M:
        BLOCK_V, num_warps = _block(V)
        _backward_kernel[(M * triton.cdiv(V, BLOCK_V),)](
            *(dy, x, target, lse, count, dx, M, V, ignore_index, label_smoothing),
            PER_ROW=reduction == "none",
            IS_MEAN=reduction == "mean",
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )
    return dx


def _block(V):
    """Columns a block, and its warps: 16 elements a lane."""
    block = min(max(triton.next_power_of_2(V), 16), MAX_BLOCK)
    return block, max(block // (32 * 16), 1)


@triton.jit
def _parts_kernel(
    x_ptr,
    target_ptr,
    partials_ptr,
    V,
    parts,
    per_part,
    ignore_index,
    SMOOTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    begin = (program % parts) * per_part
    end = tl.minimum(begin + per_part, V)
    peak = -float("inf")
    total = 0.0
    gap = 0.0
    if tl.load(target_ptr + row) != ignore_index:
        for start in range(begin, end, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < end
            x = tl.load(x_ptr + row * V + cols, mask=mask, other=-float("inf")).to(tl.float32)
            raised = tl.maximum(peak, tl.max(x, axis=0))
            # While all logits are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
            shift = tl.where(raised == -float("inf"), 0.0, raised)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift), axis=0)
            if SMOOTH:
                # The terms so far were below the old maximum; the first block has none so far.
                rise = tl.where(start == begin, 0.0, (start - begin) * (raised - peak))
                rise = tl.where(raised == peak, 0.0, rise)
                gap += rise + tl.sum(tl.where(mask, shift - x, 0.0), axis=0)
            peak = raised
    at = partials_ptr + program.to(tl.int64) * 3
    tl.store(at, peak)
    tl.store(at + 1, total)
    tl.store(at + 2, gap)


@triton.jit
def _finish_kernel(
    x_ptr,
    target_ptr,
    partials_ptr,
    losses_ptr,
    lse_ptr,
    M,
    V,
    parts,
    per_part,
    ignore_index,
    label_smoothing,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < M
    at = partials_ptr + rows * parts * 3
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    for part in range(parts):
        peak = tl.maximum(peak, tl.load(at + part * 3, mask=mask, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    gap = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        top = tl.load(at + part * 3, mask=mask, other=0.0)
        below = tl.where(top == peak, 0.0, peak - top)
        total += tl.load(at + part * 3 + 1, mask=mask, other=1.0) * tl.exp(-below)
        if SMOOTH:
            n = tl.minimum(V - part * per_part, per_part)
            gap += tl.load(at + part * 3 + 2, mask=mask, other=0.0) + n * below

    target = tl.load(target_ptr + rows, mask=mask, other=ignore_index)
    kept = target != ignore_index
    valid = kept & (target >= 0) & (target < V)
    # NaN for a row whose logits are all -inf, as in torch, and for a label out of range.
    log_total = tl.where(valid & (peak != -float("inf")), tl.log(total), float("nan"))
    label = tl.load(x_ptr + rows * V + target, mask=valid, other=0.0).to(tl.float32)
    loss = log_total + (peak - label)
    if SMOOTH:
        smooth = log_total + gap / V
        loss = (1.0 - label_smoothing) * loss + label_smoothing * smooth
    tl.store(losses_ptr + rows, tl.where(kept, loss, 0.0), mask=mask)
    tl.store(lse_ptr + rows, tl.where(kept, peak, 0.0), mask=mask)
    tl.store(lse_ptr + M + rows, tl.where(kept, log_total, 0.0), mask=mask)


@triton.jit
def _total_kernel(
    losses_ptr,
    target_ptr,
    total_ptr,
    count_ptr,
    M,
    ignore_index,
    IS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sums = tl.zeros((BLOCK_M,), tl.float32)
    kept = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = rows < M
        sums += tl.load(losses_ptr + rows, mask=mask, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + rows, mask=mask, other=ignore_index)
        kept += (target != ignore_index).to(tl.int32)
    total = tl.sum(sums, axis=0)
    count = tl.sum(kept, axis=0).to(tl.float32)
    if IS_MEAN:
        total = total / count  # 0 / 0 = NaN where every row is ignored, as in torch
    tl.store(total_ptr, total)
    tl.store(count_ptr, count)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    target_ptr,
    lse_ptr,
    count_ptr,
    dx_ptr,
    M,
    V,
    ignore_index,
    label_smoothing,
    PER_ROW: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    target = tl.load(target_ptr + row)
    kept = target != ignore_index
    dx = tl.zeros((BLOCK_V,), tl.float32)
    if kept:
        scale = tl.load(dy_ptr + (row if PER_ROW else 0)).to(tl.float32)
        if IS_MEAN:
            scale = scale / tl.load(count_ptr)
        x = tl.load(x_ptr + row * V + cols, mask=mask, other=0.0).to(tl.float32)
        # The maximum first: x - maximum is nearly exact, where lse in one float32 is not.
        p = tl.exp((x - tl.load(lse_ptr + row)) - tl.load(lse_ptr + M + row))
        wanted = tl.where(cols == target, 1.0 - label_smoothing, 0.0) + label_smoothing / V
        dx = scale * (p - wanted)
    tl.store(dx_ptr + row * V + cols, dx, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict.fromkeys(("x_ptr", "dy_ptr", "dx_ptr", "total_ptr"), "*bf16"),
    **dict.fromkeys(("partials_ptr", "losses_ptr", "lse_ptr", "count_ptr"), "*fp32"),
    "target_ptr": "*i64",
    **dict.fromkeys(("M", "V", "parts", "per_part", "ignore_index"), "i32"),
    "label_smoothing": "fp32",
}
_SPLIT = {"SMOOTH": True, "BLOCK_V": MAX_BLOCK}
_GRADIENT = {"PER_ROW": True, "IS_MEAN": False, "BLOCK_V": MAX_BLOCK}
COMPILES = [
    dict(
        kernel=kernel,
        signature={name: t for name, t in _TYPES.items() if name in kernel.arg_names},
        constexprs=constexprs,
        num_warps=warps,
        registers=96,
    )
    for kernel, constexprs, warps in (
        (_parts_kernel, _SPLIT, _block(MAX_BLOCK)[1]),
        (_finish_kernel, {"SMOOTH": True, "ROWS": ROWS}, ROWS // 32),
        (_total_kernel, {"IS_MEAN": True, "BLOCK_M": SUMMED}, 4),
        (_backward_kernel, _GRADIENT, _block(MAX_BLOCK)[1]),
    )
]
