"""Cross-entropy of logits (M, V) in Triton; csrc/cpu/cross_entropy.cpp has the formulas.

Tiling    Forward: a program owns one part of one row and walks it in blocks; few rows are cut into
          more parts, so that the whole GPU reads. A second kernel merges the parts of many rows, a
          third adds the rows up, in one program: the same bits on every run, and no atomics.
          Backward: one program a block of a row.
Traffic   forward reads the logits once, backward reads them once and writes dx once; ignored rows
          are not read. The roof is DRAM bandwidth, 3 * M * V * itemsize bytes in all.
Numerics  online: a running maximum, the sum of exp(x - maximum), and for smoothing and
          probabilities the sum of u (maximum - x), rescaled when the maximum rises. lse stays in
          two float32, the maximum and the logarithm of the sum: in one it would be wrong by 5e-4
          at logits of 1e4.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._common import (
    dense,
    row_programs,
    slope_of_tanh,
    tanh,
    unsupported_tensor,
    warps_of,
)
from slimkernels.backends.triton._cross_entropy import (
    ROWS,
    SUMMED,
    WIDTH,
    add_up,
    finish_kernel,
    first_greatest,
    greater_of,
    row_weights,
    slopes,
    total_kernel,
)

MAX_BLOCK = 4096


def unsupported(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    if target.requires_grad:
        return "the gradient of target's probabilities is torch's"
    return unsupported_tensor(x)


def forward(
    x, target, weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_correct
):
    x, target, weight = x.contiguous(), target.contiguous(), dense(weight)
    M, V = x.shape
    has_labels = not target.is_floating_point()
    losses = x.new_empty(M, dtype=torch.float32)
    stats = x.new_empty((3, M), dtype=torch.float32)
    correct = x.new_empty(M if return_correct else 0, dtype=torch.bool)
    if M:
        BLOCK_V, num_warps = _block(V)
        blocks = triton.cdiv(V, BLOCK_V)
        parts = triton.cdiv(row_programs(x, 1 << 30), M)
        per_part = triton.cdiv(blocks, min(parts, blocks)) * BLOCK_V
        parts = triton.cdiv(V, per_part)
        partials = x.new_empty((M, parts, WIDTH.value), dtype=torch.float32)
        _parts_kernel[(M * parts,)](
            *(x, target, weight, partials, V, parts, per_part),
            *(ignore_index, label_smoothing, softcap),
            HAS_LABELS=has_labels,
            SPREADS=label_smoothing > 0 or not has_labels,
            CAPPED=softcap > 0,
            CORRECT=return_correct,
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )
        finish_kernel[(triton.cdiv(M, ROWS),)](
            *(x, V, 1, target, weight, partials, losses, stats),
            *(correct.view(torch.uint8) if return_correct else None, M, V, parts),
            *(ignore_index, label_smoothing, z_loss, softcap),
            HAS_LABELS=has_labels,
            CAPPED=softcap > 0,
            ROWS=ROWS,
            num_warps=ROWS // 32,
        )
    if reduction == "none":
        return losses, stats, x.new_empty(1, dtype=torch.float32), correct
    total, divisor = add_up(losses, target, weight, V, ignore_index, reduction)
    return total, stats, divisor, correct


def backward(
    dy,
    dlse,
    x,
    target,
    weight,
    stats,
    divisor,
    ignore_index,
    reduction,
    label_smoothing,
    z_loss,
    softcap,
):
    dy, dlse, x, target, weight = (dense(t) for t in (dy, dlse, x, target, weight))
    M, V = x.shape
    dx = torch.empty_like(x)
    has_labels = not target.is_floating_point()
    if M:
        BLOCK_V, num_warps = _block(V)
        _backward_kernel[(M * triton.cdiv(V, BLOCK_V),)](
            *(dy, dlse, x, target, weight, stats, divisor, dx, M, V),
            *(ignore_index, label_smoothing, z_loss, softcap),
            HAS_LABELS=has_labels,
            SPREADS=label_smoothing > 0 or not has_labels,
            CAPPED=softcap > 0,
            PER_ROW=reduction == "none",
            IS_MEAN=reduction == "mean",
            BLOCK_V=BLOCK_V,
            num_warps=num_warps,
        )
    return dx


def _block(V):
    """Columns a block, and its warps."""
    block = min(max(triton.next_power_of_2(V), 16), MAX_BLOCK)
    return block, warps_of(block)


@triton.jit
def _shares(target_ptr, weight_ptr, row, cols, mask, V, label_smoothing, HAS_LABELS: tl.constexpr):
    """u of a block of classes: what smoothing or probabilities spread over them; 0 past the end."""
    if HAS_LABELS:
        u = tl.where(mask, 1.0, 0.0)
    else:
        q = tl.load(target_ptr + row * V + cols, mask=mask, other=0.0).to(tl.float32)
        u = tl.where(mask, (1.0 - label_smoothing) * q + label_smoothing / V, 0.0)
    if weight_ptr is not None:
        u *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return u


@triton.jit
def _parts_kernel(
    x_ptr,
    target_ptr,
    weight_ptr,
    partials_ptr,
    V,
    parts,
    per_part,
    ignore_index,
    label_smoothing,
    softcap,
    HAS_LABELS: tl.constexpr,
    SPREADS: tl.constexpr,
    CAPPED: tl.constexpr,
    CORRECT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    begin = (program % parts) * per_part
    end = tl.minimum(begin + per_part, V)
    peak = -float("inf")
    total = 0.0
    gap = 0.0
    mass = 0.0
    highest = -float("inf")
    place = begin
    kept = True
    if HAS_LABELS:
        kept = tl.load(target_ptr + row) != ignore_index
    if kept:
        for start in range(begin, end, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < end
            x = tl.load(x_ptr + row * V + cols, mask=mask, other=-float("inf")).to(tl.float32)
            if CORRECT:
                new = tl.max(x, axis=0)
                place = greater_of(place, highest, first_greatest(x, new, cols, V, 0), new)
                highest = tl.maximum(highest, new)
            if CAPPED:
                x = tl.where(mask, softcap * tanh(x / softcap), -float("inf"))
            raised = tl.maximum(peak, tl.max(x, axis=0))
            # While all logits are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
            shift = tl.where(raised == -float("inf"), 0.0, raised)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift), axis=0)
            if SPREADS:
                # The terms so far were below the old maximum.
                gap += tl.where((raised == peak) | (mass == 0.0), 0.0, mass * (raised - peak))
                u = _shares(target_ptr, weight_ptr, row, cols, mask, V, label_smoothing, HAS_LABELS)
                gap += tl.sum(tl.where(mask, u * (shift - x), 0.0), axis=0)
                mass += tl.sum(u, axis=0)
            peak = raised
    at = partials_ptr + program.to(tl.int64) * WIDTH
    tl.store(at, peak)
    tl.store(at + 1, total)
    tl.store(at + 2, gap)
    tl.store(at + 3, mass)
    if CORRECT:
        tl.store(at + 4, highest)
        tl.store(at + 5, place.to(tl.float32, bitcast=True))


@triton.jit
def _backward_kernel(
    dy_ptr,
    dlse_ptr,
    x_ptr,
    target_ptr,
    weight_ptr,
    stats_ptr,
    divisor_ptr,
    dx_ptr,
    M,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_LABELS: tl.constexpr,
    SPREADS: tl.constexpr,
    CAPPED: tl.constexpr,
    PER_ROW: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = cols < V
    target = row
    kept = True
    if HAS_LABELS:
        target = tl.load(target_ptr + row)
        kept = target != ignore_index
    dx = tl.zeros((BLOCK_V,), tl.float32)
    if kept:
        dy = tl.load(dy_ptr + (row if PER_ROW else 0)).to(tl.float32)
        if IS_MEAN:
            dy = dy / tl.load(divisor_ptr)
        dlse = 0.0
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + row)
        weight = 1.0
        if HAS_LABELS:
            weight = row_weights(target, weight_ptr, (target >= 0) & (target < V))
        peak = tl.load(stats_ptr + row)
        log_total = tl.load(stats_ptr + M + row)
        lse = peak + log_total
        own, even, extra = slopes(dy, dlse, weight, lse, V, label_smoothing, z_loss, HAS_LABELS)
        x = tl.load(x_ptr + row * V + cols, mask=mask, other=0.0).to(tl.float32)
        outer = 1.0
        if CAPPED:
            outer = slope_of_tanh(x / softcap)
            x = softcap * tanh(x / softcap)
        # The maximum first: x - maximum is nearly exact, where lse in one float32 is not.
        p = tl.exp((x - peak) - log_total)
        dx = extra * p
        if HAS_LABELS:
            dx += own * (p - tl.where(cols == target, 1.0, 0.0))
        if SPREADS:
            mass = tl.load(stats_ptr + 2 * M + row)
            u = _shares(target_ptr, weight_ptr, row, cols, mask, V, label_smoothing, HAS_LABELS)
            dx += even * (mass * p - u)
        dx *= outer
    tl.store(dx_ptr + row * V + cols, dx, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_FLOATS = ("partials_ptr", "losses_ptr", "stats_ptr", "divisor_ptr", "weight_ptr", "dlse_ptr")
_FLOATS += ("total_ptr",)
_INTEGERS = "M", "V", "parts", "per_part", "ignore_index", "row_stride", "class_stride"
_TYPES = {
    **dict.fromkeys(("x_ptr", "dy_ptr", "dx_ptr"), "*bf16"),
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(_INTEGERS, "i32"),
    **dict.fromkeys(("label_smoothing", "z_loss", "softcap"), "fp32"),
    "correct_ptr": "*u8",
}
_LABELS = {"HAS_LABELS": True, "SPREADS": True, "CAPPED": False, "CORRECT": True}
_PROBABILITIES = {"HAS_LABELS": False, "SPREADS": True, "CAPPED": True, "CORRECT": False}
_REDUCTION = {"PER_ROW": True, "IS_MEAN": False}
COMPILES = [
    dict(
        kernel=kernel,
        signature={n: t for n, t in types.items() if n in kernel.arg_names},
        constexprs={n: c for n, c in constexprs.items() if n in kernel.arg_names},
        num_warps=warps,
        registers=96,
        **({"narrow": narrow[kind is _LABELS]} if narrow else {}),
    )
    for kernel, own, warps, *narrow in (
        (_parts_kernel, {"BLOCK_V": MAX_BLOCK}, _block(MAX_BLOCK)[1]),
        (finish_kernel, {"ROWS": ROWS}, ROWS // 32, *(dict(why="a few numbers a row"),) * 2),
        (
            *(total_kernel, {"IS_MEAN": True, "BLOCK_M": SUMMED}, 4),
            *(dict(load=n, why="each label looks its class's weight up") for n in (0, 16)),
        ),
        (_backward_kernel, _REDUCTION | {"BLOCK_V": MAX_BLOCK}, _block(MAX_BLOCK)[1]),
    )
    for kind, target in ((_LABELS, "*i64"), (_PROBABILITIES, "*fp32"))
    for constexprs, types in ((own | kind, _TYPES | {"target_ptr": target}),)
]
