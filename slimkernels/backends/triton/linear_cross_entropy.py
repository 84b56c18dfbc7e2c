"""Cross-entropy of a linear layer's logits in Triton: x (N, C) @ weight (V, C)^T and its loss.

Tiling    The rows that are kept come first in an order that is sorted on the device; how many they
          are only the device knows, and programs past that number leave at once. Forward: a
          program owns BLOCK_M of them and one part of the vocabulary, walks it in tiles of logits,
          and keeps maximum, sum and the label's logit; finish_kernel merges the parts. Backward:
          for a chunk of rows at a time, tiles of logits again, whose gradient goes to a buffer of
          CHUNK bytes, and from there into the products for dx and dweight (_linear_products.py).
          The same bits on every run, and no atomics.
Traffic   forward stores no logits: x once a part, weight once a block of rows, both from L2 where
          programs run side by side. Backward writes dlogits once and reads them twice, and adds
          dweight up in float32, once a chunk. Four products of N * V * C, eager's three and
          forward's logits again. Rows at `positions` are read where they lie; their dx is made
          apart and added up by row in a second pass, since positions may repeat.
Numerics  products add up in float32; logits stay there, where a linear layer rounds them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends._positions import scatter_rows
from slimkernels.backends.triton._common import slope_of_tanh, tanh, unsupported_tensor
from slimkernels.backends.triton._cross_entropy import (
    ROWS,
    WIDTH,
    add_up,
    finish_kernel,
    first_greatest,
    greater_of,
    slopes,
)
from slimkernels.backends.triton._linear_products import (
    add_products,
    dweight_kernel,
    dx_kernel,
    launch_of,
    logits_tile,
    precision,
)

CHUNK = 1 << 28  # bytes of dlogits
PARTS = 8  # of the vocabulary, in forward: enough programs where few rows are kept


def unsupported(
    x,
    weight,
    target,
    bias,
    positions,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    return_correct,
    reduction,
    wanted,
):
    if x.shape[1] == 0:
        return "input has no features"
    return unsupported_tensor(x)


def forward(
    x,
    weight,
    target,
    bias,
    positions,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    return_correct,
    reduction,
    wanted,
):
    x, weight, bias = _operands(x, weight, bias)
    N, C, V = target.shape[0], x.shape[1], weight.shape[0]
    kept = _kept_first(target, positions, ignore_index, x.shape[0])
    losses = x.new_empty(N, dtype=torch.float32)
    stats = x.new_empty((3, N), dtype=torch.float32)
    correct = x.new_empty(N if return_correct else 0, dtype=torch.bool)
    gradients = (x.new_empty(0) for _ in range(3))  # backward's
    if N:
        launch = launch_of(x, softcap)
        parts = min(PARTS, triton.cdiv(V, launch["BLOCK_V"]))
        per_part = triton.cdiv(triton.cdiv(V, parts), launch["BLOCK_V"]) * launch["BLOCK_V"]
        parts = triton.cdiv(V, per_part)
        partials = x.new_empty((N, parts, WIDTH.value), dtype=torch.float32)
        label_logits = x.new_empty(N, dtype=torch.float32)
        _parts_kernel[(triton.cdiv(N, launch["BLOCK_M"]) * parts,)](
            *(x, weight, bias, kept.rows, kept.labels, kept.count, partials, label_logits),
            *(N, C, V, parts, per_part, softcap),
            SMOOTH=label_smoothing > 0,
            CAPPED=softcap > 0,
            CORRECT=return_correct,
            PRECISION=precision(),
            **launch,
        )
        finish_kernel[(triton.cdiv(N, ROWS),)](
            *(label_logits, 1, 0, kept.labels, None, partials, losses, stats),
            *(correct.view(torch.uint8) if return_correct else None, N, V, parts),
            *(ignore_index, label_smoothing, z_loss, softcap),
            HAS_LABELS=True,
            CAPPED=softcap > 0,
            ROWS=ROWS,
            num_warps=ROWS // 32,
        )
    if return_correct:
        correct = _in_order(correct, kept)
    if reduction == "none":
        divisor = x.new_zeros(1, dtype=torch.float32)
        return _in_order(losses, kept), stats, divisor, correct, *gradients
    total, divisor = add_up(losses, kept.labels, None, V, ignore_index, reduction)
    return total, stats, divisor, correct, *gradients


def backward(
    dy,
    x,
    weight,
    target,
    bias,
    positions,
    stats,
    divisor,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    reduction,
    wanted,
):
    dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    x, weight, bias = _operands(x, weight, bias)
    N, C, V = target.shape[0], x.shape[1], weight.shape[0]
    kept = _kept_first(target, positions, ignore_index, x.shape[0])
    dy = dy[kept.order] if reduction == "none" else dy / divisor if reduction == "mean" else dy
    # In float32 where they are added up, 0 where nothing is kept.
    shapes, floats = ((N, C), (V, C), (V,)), (x.dtype, torch.float32, torch.float32)
    gradients = [
        x.new_zeros(shape, dtype=dtype) if is_wanted else None
        for shape, dtype, is_wanted in zip(shapes, floats, wanted, strict=True)
    ]
    launch = launch_of(x, softcap)
    chunk = max(CHUNK // (V * x.element_size()), 1)
    chunk = min(triton.cdiv(chunk, launch["BLOCK_M"]) * launch["BLOCK_M"], max(N, 1))
    dlogits = x.new_empty((chunk, V)) if N else None
    for first in range(0, N, chunk):
        blocks = triton.cdiv(min(chunk, N - first), launch["BLOCK_M"])
        _dlogits_kernel[(blocks * triton.cdiv(V, launch["BLOCK_V"]),)](
            *(dy, x, weight, bias, kept.rows, kept.labels, kept.count, stats, dlogits),
            *(first, N, C, V, label_smoothing, z_loss, softcap),
            SMOOTH=label_smoothing > 0,
            CAPPED=softcap > 0,
            PER_ROW=reduction == "none",
            PRECISION=precision(),
            **launch,
        )
        add_products(dlogits, first, chunk, kept, x, weight, gradients)
    if positions is not None and wanted[0]:
        inside = positions.clamp(0, x.shape[0] - 1)
        gradients[0] = scatter_rows(gradients[0], inside, x.shape[0])
    gradients = zip(gradients, dtypes, strict=True)
    return tuple(x.new_empty(0) if g is None else g.to(dtype) for g, dtype in gradients)


def _operands(x, weight, bias):
    """In x's dtype and without gaps."""
    bias = None if bias is None else bias.contiguous()
    return x.contiguous(), weight.to(x.dtype).contiguous(), bias


class _Kept(NamedTuple):
    """The targets that are kept, before those that are not; all of it on the device.

    order   (N,) of the targets
    rows    (N,) of x, labels (N,) in that order
    count   how many are kept
    """

    order: Tensor
    rows: Tensor
    labels: Tensor
    count: Tensor


def _kept_first(target, positions, ignore_index, x_rows):
    kept = target != ignore_index
    order = torch.argsort((~kept).to(torch.int8), stable=True)
    labels, count = target[order], kept.sum(dtype=torch.int32)
    if positions is None:
        return _Kept(order, order, labels, count)
    rows = positions[order]
    # Nobody has looked at them on a GPU. Where one lies outside, its label becomes none: NaN.
    outside = (rows < 0) | (rows >= x_rows)
    none = -1 if ignore_index != -1 else -2
    labels = labels.masked_fill(outside & (labels != ignore_index), none)
    return _Kept(order, rows.masked_fill(outside, 0), labels, count)


def _in_order(values, kept):
    """From the order of _kept_first to the targets'."""
    return torch.empty_like(values).scatter_(0, kept.order, values)


@triton.jit
def _parts_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    labels_ptr,
    count_ptr,
    partials_ptr,
    label_logits_ptr,
    N,
    C,
    V,
    parts,
    per_part,
    softcap,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    CORRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Neighbours share a part: its rows of weight come from L2.
    blocks = tl.cdiv(N, BLOCK_M)
    part = tl.program_id(0) // blocks
    slots = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    if (tl.program_id(0) % blocks) * BLOCK_M >= count:
        return
    inside = slots < count
    rows = tl.load(rows_ptr + slots, mask=inside, other=0)
    labels = tl.load(labels_ptr + slots, mask=inside, other=-1)
    begin = part * per_part
    end = tl.minimum(begin + per_part, V)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    gap = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    place = tl.zeros((BLOCK_M,), tl.int32) + begin
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = logits_tile(
            *(x_ptr, weight_ptr, bias_ptr, rows, inside, cols, C, V),
            *(PRECISION, BLOCK_M, BLOCK_V, BLOCK_C),
        )
        own += tl.sum(tl.where(cols[None, :] == labels[:, None], z, 0.0), axis=1)
        if CORRECT:
            seen = tl.where((cols < end)[None, :], z, -float("inf"))
            new = tl.max(seen, axis=1)
            first = first_greatest(seen, new[:, None], cols[None, :], V, 1)
            place = greater_of(place, highest, first, new)
            highest = tl.maximum(highest, new)
        if CAPPED:
            z = softcap * tanh(z / softcap)
        z = tl.where((cols < end)[None, :], z, -float("inf"))
        raised = tl.maximum(peak, tl.max(z, axis=1))
        # While all logits are -inf, they add exp(-inf - 0) = 0, not exp(-inf + inf) = NaN.
        shift = tl.where(raised == -float("inf"), 0.0, raised)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(z - shift[:, None]), axis=1)
        if SMOOTH:
            rise = tl.where((start == begin) | (raised == peak), 0.0, raised - peak)
            gap += (start - begin) * rise
            gap += tl.sum(tl.where((cols < end)[None, :], shift[:, None] - z, 0.0), axis=1)
        peak = raised
    at = partials_ptr + (slots.to(tl.int64) * parts + part) * WIDTH
    tl.store(at, peak, mask=inside)
    tl.store(at + 1, total, mask=inside)
    tl.store(at + 2, gap, mask=inside)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    if SMOOTH:
        mass += end - begin
    tl.store(at + 3, mass, mask=inside)
    if CORRECT:
        tl.store(at + 4, highest, mask=inside)
        tl.store(at + 5, place.to(tl.float32, bitcast=True), mask=inside)
    here = inside & (labels >= begin) & (labels < end)
    tl.store(label_logits_ptr + slots, own, mask=here)


@triton.jit
def _dlogits_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows_ptr,
    labels_ptr,
    count_ptr,
    stats_ptr,
    dlogits_ptr,
    first,
    N,
    C,
    V,
    label_smoothing,
    z_loss,
    softcap,
    SMOOTH: tl.constexpr,
    CAPPED: tl.constexpr,
    PER_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of the slots from `first` on, in a buffer of their own; slots past count are not written."""
    # Neighbours share the classes: their rows of weight come from L2.
    classes = tl.cdiv(V, BLOCK_V)
    block = tl.program_id(0) // classes
    cols = (tl.program_id(0) % classes) * BLOCK_V + tl.arange(0, BLOCK_V)
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slots = first + local
    count = tl.load(count_ptr)
    if first + block * BLOCK_M >= count:
        return
    inside = slots < count
    rows = tl.load(rows_ptr + slots, mask=inside, other=0)
    z = logits_tile(
        *(x_ptr, weight_ptr, bias_ptr, rows, inside, cols, C, V),
        *(PRECISION, BLOCK_M, BLOCK_V, BLOCK_C),
    )
    labels = tl.load(labels_ptr + slots, mask=inside, other=-1)
    peak = tl.load(stats_ptr + slots, mask=inside, other=0.0)
    log_total = tl.load(stats_ptr + N + slots, mask=inside, other=0.0)
    if PER_ROW:
        dy = tl.load(dy_ptr + slots, mask=inside, other=0.0).to(tl.float32)
    else:
        dy = tl.load(dy_ptr).to(tl.float32)
    dy = tl.where(inside, dy, 0.0)
    own, even, extra = slopes(dy, 0.0, 1.0, peak + log_total, V, label_smoothing, z_loss, True)
    outer = 1.0
    if CAPPED:
        outer = slope_of_tanh(z / softcap)
        z = softcap * tanh(z / softcap)
    p = tl.exp((z - peak[:, None]) - log_total[:, None])
    hit = tl.where(cols[None, :] == labels[:, None], 1.0, 0.0)
    dz = extra[:, None] * p + own[:, None] * (p - hit)
    if SMOOTH:
        dz += even[:, None] * (V * p - 1.0)
    at = dlogits_ptr + local[:, None].to(tl.int64) * V + cols[None, :]
    tl.store(at, dz * outer, mask=inside[:, None] & (cols < V)[None, :])


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_FLOATS = "partials_ptr", "label_logits_ptr", "stats_ptr", "dweight_ptr", "dbias_ptr"
_OPERANDS = "x_ptr", "weight_ptr", "bias_ptr", "dlogits_ptr", "dx_ptr"
_INTEGERS = "N", "C", "V", "parts", "per_part", "first", "chunk"
_TYPES = {
    **dict.fromkeys(("order_ptr", "rows_ptr", "labels_ptr"), "*i64"),
    **dict.fromkeys((*_FLOATS, "dy_ptr"), "*fp32"),
    **dict.fromkeys(_INTEGERS, "i32"),
    **dict.fromkeys(("label_smoothing", "z_loss", "softcap"), "fp32"),
    "count_ptr": "*i32",
}
_OPTIONS = {"SMOOTH": True, "PER_ROW": False, "PRECISION": "ieee"}
_PLAIN, _ALL = {"CAPPED": False, "CORRECT": False}, {"CAPPED": True, "CORRECT": True}
COMPILES = [
    dict(
        kernel=kernel,
        signature={
            name: t
            for name, t in (_TYPES | dict.fromkeys(_OPERANDS, pointer)).items()
            if name in kernel.arg_names
        },
        constexprs={
            name: c
            for name, c in (_OPTIONS | features | launch).items()
            if name in kernel.arg_names
        },
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        registers=255,
        **(dict(wgmma=True) if dtype == torch.bfloat16 else {}),
    )
    for kernel, features in (
        *(
            (kernel, _PLAIN)
            for kernel in (_parts_kernel, _dlogits_kernel, dx_kernel, dweight_kernel)
        ),
        *((kernel, _ALL) for kernel in (_parts_kernel, _dlogits_kernel)),
    )
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
    for launch in (launch_of(torch.empty(0, dtype=dtype), float(features["CAPPED"])),)
]
