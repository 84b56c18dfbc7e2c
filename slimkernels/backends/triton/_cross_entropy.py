"""What both cross-entropies in Triton do with rows whose logits have been walked in parts.

Tiling    finish_kernel merges the parts of ROWS rows a program; total_kernel adds the rows up, in
          one program: the same bits on every run, and no atomics.
Numerics  see cross_entropy.py.
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._common import tanh

ROWS = 128  # that one program of finish_kernel finishes
SUMMED = 2048  # rows that total_kernel adds at once
# What a part of a row leaves: its maximum, the sums of exp(x - maximum), of u (maximum - x) and of
# u, and of its logits before softcap the greatest and the bits of its class, as first_greatest has
# it.
WIDTH = tl.constexpr(6)


def add_up(losses, target, weight, V, ignore_index, reduction):
    """The loss of all rows, and what their mean divides by."""
    M = losses.shape[0]
    total, divisor = losses.new_empty(()), losses.new_empty(1)
    total_kernel[(1,)](
        *(losses, target, weight, total, divisor, M, V, ignore_index),
        HAS_LABELS=not target.is_floating_point(),
        IS_MEAN=reduction == "mean",
        BLOCK_M=min(max(triton.next_power_of_2(M), 16), SUMMED),
    )
    return total, divisor


@triton.jit
def slopes(dy, dlse, rows, lse, V, label_smoothing, z_loss, HAS_LABELS: tl.constexpr):
    """(own, even, extra) of dz = own (p - 1 at the label) + even (mass p - u) + extra p."""
    if HAS_LABELS:
        own = dy * rows * (1.0 - label_smoothing)
        even = dy * label_smoothing / V
    else:
        own = 0.0
        even = dy
    return own, even, 2.0 * z_loss * dy * rows * lse + dlse


@triton.jit
def row_weights(target, weight_ptr, valid):
    """What rows count in the sum and the mean: 1, or the weight of their label."""
    if weight_ptr is not None:
        return tl.load(weight_ptr + target, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.where(valid, 1.0, 0.0)


@triton.jit
def first_greatest(x, highest, cols, V, AXIS: tl.constexpr):
    """The first of the classes `cols` whose logit is `highest`, their maximum. NaN is greater, as
    in argmax, and its class comes as a negative number, less V."""
    return tl.min(tl.where(x != x, cols - V, tl.where(x == highest, cols, V)), axis=AXIS)


@triton.jit
def greater_of(place, highest, new_place, new_highest):
    """Of two classes from first_greatest, the one that argmax gives; the new one comes later."""
    later = (new_place < 0) | (new_highest > highest)
    return tl.where((place >= 0) & later, new_place, place)


@triton.jit
def finish_kernel(
    x_ptr,
    row_stride,
    class_stride,
    target_ptr,
    weight_ptr,
    partials_ptr,
    losses_ptr,
    stats_ptr,
    correct_ptr,
    M,
    V,
    parts,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    HAS_LABELS: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < M
    at = partials_ptr + rows * parts * WIDTH
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    for part in range(parts):
        peak = tl.maximum(peak, tl.load(at + part * WIDTH, mask=mask, other=0.0))
    total = tl.zeros((ROWS,), tl.float32)
    gap = tl.zeros((ROWS,), tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    for part in range(parts):
        top = tl.load(at + part * WIDTH, mask=mask, other=0.0)
        below = tl.where(top == peak, 0.0, peak - top)
        total += tl.load(at + part * WIDTH + 1, mask=mask, other=1.0) * tl.exp(-below)
        share = tl.load(at + part * WIDTH + 3, mask=mask, other=0.0)
        gap += tl.load(at + part * WIDTH + 2, mask=mask, other=0.0)
        gap += tl.where((below == 0.0) | (share == 0.0), 0.0, share * below)
        mass += share

    kept = mask
    valid = mask
    target = rows
    if HAS_LABELS:
        target = tl.load(target_ptr + rows, mask=mask, other=ignore_index)
        kept = target != ignore_index
        valid = kept & (target >= 0) & (target < V)
    # NaN for a row whose logits are all -inf, as in torch, and for a label out of range.
    log_total = tl.where(valid & (peak != -float("inf")), tl.log(total), float("nan"))
    lse = peak + log_total
    loss = mass * log_total + gap
    if HAS_LABELS:
        at_label = x_ptr + rows * row_stride + target * class_stride
        label = tl.load(at_label, mask=valid, other=0.0).to(tl.float32)
        if CAPPED:
            label = softcap * tanh(label / softcap)
        own = (1.0 - label_smoothing) * (log_total + (peak - label)) + z_loss * lse * lse
        loss = row_weights(target, weight_ptr, valid) * own + tl.where(
            label_smoothing > 0.0, label_smoothing / V * loss, 0.0
        )
    else:
        loss += z_loss * lse * lse
    tl.store(losses_ptr + rows, tl.where(kept, loss, 0.0), mask=mask)
    tl.store(stats_ptr + rows, tl.where(kept, peak, 0.0), mask=mask)
    tl.store(stats_ptr + M + rows, tl.where(kept, log_total, 0.0), mask=mask)
    tl.store(stats_ptr + 2 * M + rows, tl.where(kept, mass, 0.0), mask=mask)
    if correct_ptr is not None:
        highest = tl.full((ROWS,), -float("inf"), tl.float32)
        chosen = tl.zeros((ROWS,), tl.int32)
        for part in range(parts):
            new = tl.load(at + part * WIDTH + 4, mask=mask, other=0.0)
            place = tl.load(at + part * WIDTH + 5, mask=mask, other=0.0).to(tl.int32, bitcast=True)
            chosen = greater_of(chosen, highest, place, new)
            highest = tl.maximum(highest, new)
        chosen += tl.where(chosen < 0, V, 0)
        tl.store(correct_ptr + rows, (kept & (chosen == target)).to(tl.uint8), mask=mask)


@triton.jit
def total_kernel(
    losses_ptr,
    target_ptr,
    weight_ptr,
    total_ptr,
    divisor_ptr,
    M,
    V,
    ignore_index,
    HAS_LABELS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    sums = tl.zeros((BLOCK_M,), tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        kept = rows < M
        sums += tl.load(losses_ptr + rows, mask=kept, other=0.0).to(tl.float32)
        target = rows
        if HAS_LABELS:
            target = tl.load(target_ptr + rows, mask=kept, other=ignore_index)
            kept = target != ignore_index
            weights += row_weights(target, weight_ptr, kept & (target >= 0) & (target < V))
        else:
            weights += tl.where(kept, 1.0, 0.0)
    total = tl.sum(sums, axis=0)
    divisor = tl.sum(weights, axis=0)
    if IS_MEAN:
        total = total / divisor  # 0 / 0 = NaN where every row is ignored, as in torch
    tl.store(total_ptr, total)
    tl.store(divisor_ptr, divisor)
