"""Cross-entropy of a linear layer's logits in Triton: x (N, C) @ weight (V, C)^T and its loss.

Tiling    The rows that are kept come first in an order that is sorted on the device; how many they
          are only the device knows, and programs past that number leave at once. Forward: a
          program owns BLOCK_M of them and one part of the vocabulary, walks it in tiles of logits,
          and keeps maximum, sum and the label's logit; finish_kernel merges the parts. Backward:
          for a chunk of rows at a time, tiles of logits again, whose gradient goes to a buffer of
          CHUNK bytes, and from there into the products for dx and dweight. A tile of either has
          one owner: the same bits on every run, and no atomics.
Traffic   forward stores no logits: x once a part, weight once a block of rows, both from L2 where
          programs run side by side. Backward writes dlogits once and reads them twice, and adds
          dweight up in float32, once a chunk. Four products of N * V * C, eager's three and
          forward's logits again.
Numerics  products add up in float32; logits stay there, where a linear layer rounds them.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends.triton._common import tanh, unsupported_tensor
from slimkernels.backends.triton.cross_entropy import (
    ROWS,
    add_up,
    finish_kernel,
    slope_of_tanh,
    slopes,
)

CHUNK = 1 << 28  # bytes of dlogits
PARTS = 8  # of the vocabulary, in forward: enough programs where few rows are kept


def unsupported(
    x, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction, wanted
):
    return unsupported_tensor(x)


def forward(
    x, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, reduction, wanted
):
    x, weight, bias = _operands(x, weight, bias)
    (N, C), V = x.shape, weight.shape[0]
    order, labels, count = _kept_first(target, ignore_index)
    losses = x.new_empty(N, dtype=torch.float32)
    stats = x.new_empty((3, N), dtype=torch.float32)
    gradients = (x.new_empty(0) for _ in range(3))  # backward's
    if N:
        launch = _launch(x)
        parts = min(PARTS, triton.cdiv(V, launch["BLOCK_V"]))
        per_part = triton.cdiv(triton.cdiv(V, parts), launch["BLOCK_V"]) * launch["BLOCK_V"]
        parts = triton.cdiv(V, per_part)
        partials = x.new_empty((N, parts, 4), dtype=torch.float32)
        label_logits = x.new_empty(N, dtype=torch.float32)
        _parts_kernel[(triton.cdiv(N, launch["BLOCK_M"]) * parts,)](
            *(x, weight, bias, order, labels, count, partials, label_logits),
            *(N, C, V, parts, per_part, softcap),
            SMOOTH=label_smoothing > 0,
            CAPPED=softcap > 0,
            PRECISION=_precision(),
            **launch,
        )
        finish_kernel[(triton.cdiv(N, ROWS),)](
            *(label_logits, 1, 0, labels, None, partials, losses, stats, N, V, parts),
            *(ignore_index, label_smoothing, z_loss, softcap),
            HAS_LABELS=True,
            CAPPED=softcap > 0,
            ROWS=ROWS,
            num_warps=ROWS // 32,
        )
    if reduction == "none":
        divisor = x.new_zeros(1, dtype=torch.float32)
        return torch.empty_like(losses).scatter_(0, order, losses), stats, divisor, *gradients
    total, divisor = add_up(losses, labels, None, V, ignore_index, reduction, torch.float32)
    return total, stats, divisor, *gradients


def backward(
    dy,
    x,
    weight,
    target,
    bias,
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
    (N, C), V = x.shape, weight.shape[0]
    order, labels, count = _kept_first(target, ignore_index)
    dy = dy.contiguous() if reduction != "mean" else dy / divisor
    # In float32 where they are added up, 0 where nothing is kept.
    dx = x.new_zeros((N, C) if wanted[0] else 0)
    dweight = x.new_zeros((V, C) if wanted[1] else 0, dtype=torch.float32)
    dbias = x.new_zeros(V if wanted[2] else 0, dtype=torch.float32)
    launch = _launch(x)
    rows = max(CHUNK // (V * x.element_size()), 1)
    rows = min(triton.cdiv(rows, launch["BLOCK_M"]) * launch["BLOCK_M"], max(N, 1))
    dlogits = x.new_empty((rows, V)) if N else None
    for first in range(0, N, rows):
        blocks = triton.cdiv(min(rows, N - first), launch["BLOCK_M"])
        _dlogits_kernel[(blocks * triton.cdiv(V, launch["BLOCK_V"]),)](
            *(dy, x, weight, bias, order, labels, count, stats, dlogits),
            *(first, N, C, V, label_smoothing, z_loss, softcap),
            SMOOTH=label_smoothing > 0,
            CAPPED=softcap > 0,
            PER_ROW=reduction == "none",
            PRECISION=_precision(),
            **launch,
        )
        _products(dlogits, x, weight, order, count, first, rows, dx, dweight, dbias, wanted)
    gradients = zip((dx, dweight, dbias), dtypes, strict=True)
    return tuple(g if dtype is None else g.to(dtype) for g, dtype in gradients)


def _products(dlogits, x, weight, order, count, first, rows, dx, dweight, dbias, wanted):
    """What a chunk's dlogits add to the gradients."""
    (N, C), V = x.shape, weight.shape[0]
    launch = _launch(x)
    BLOCK_M, BLOCK_V, BLOCK_C = (launch[name] for name in ("BLOCK_M", "BLOCK_V", "BLOCK_C"))
    if wanted[0]:
        blocks = triton.cdiv(min(rows, N - first), BLOCK_M) * triton.cdiv(C, BLOCK_V)
        # BLOCK_V columns of dx a tile, BLOCK_C classes at a time: the roles are exchanged.
        _dx_kernel[(blocks,)](
            *(dlogits, weight, order, count, dx, first, C, V),
            PRECISION=_precision(),
            **launch,
        )
    if wanted[1] or wanted[2]:
        columns = triton.cdiv(C, BLOCK_V) if wanted[1] else 1
        _dweight_kernel[(triton.cdiv(V, BLOCK_M) * columns,)](
            *(dlogits, x, order, count),
            *(dweight if wanted[1] else None, dbias if wanted[2] else None),
            *(first, rows, C, V),
            PRECISION=_precision(),
            **launch,
        )


def _operands(x, weight, bias):
    """In x's dtype and without gaps."""
    bias = None if bias is None else bias.contiguous()
    return x.contiguous(), weight.to(x.dtype).contiguous(), bias


def _kept_first(target, ignore_index):
    """The order of rows that has the kept ones first, their labels, and how many they are."""
    kept = target != ignore_index
    order = torch.argsort((~kept).to(torch.int8), stable=True)
    return order, target[order], kept.sum(dtype=torch.int32)


def _precision():
    """What torch multiplies float32 in."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _launch(x):
    if x.dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_V=64, BLOCK_C=16, num_warps=4, num_stages=2)
    return dict(BLOCK_M=128, BLOCK_V=128, BLOCK_C=64, num_warps=8, num_stages=3)


@triton.jit
def _logits(
    x_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    inside,
    cols,
    C,
    V,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of logits: the rows `rows` of x, the classes `cols`; before the softcap."""
    inner = tl.arange(0, BLOCK_C)
    x_at = x_ptr + rows[:, None] * C + inner[None, :]
    w_at = weight_ptr + cols[None, :].to(tl.int64) * C + inner[:, None]
    logits = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, C, BLOCK_C):
        within = start + inner < C
        x = tl.load(x_at + start, mask=inside[:, None] & within[None, :], other=0.0)
        w = tl.load(w_at + start, mask=(cols < V)[None, :] & within[:, None], other=0.0)
        logits = tl.dot(x, w, logits, input_precision=PRECISION)
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def _parts_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
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
    rows = tl.load(order_ptr + slots, mask=inside, other=0)
    labels = tl.load(labels_ptr + slots, mask=inside, other=-1)
    begin = part * per_part
    end = tl.minimum(begin + per_part, V)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    gap = tl.zeros((BLOCK_M,), tl.float32)
    own = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        z = _logits(
            *(x_ptr, weight_ptr, bias_ptr, rows, inside, cols, C, V),
            *(PRECISION, BLOCK_M, BLOCK_V, BLOCK_C),
        )
        own += tl.sum(tl.where(cols[None, :] == labels[:, None], z, 0.0), axis=1)
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
    at = partials_ptr + (slots.to(tl.int64) * parts + part) * 4
    tl.store(at, peak, mask=inside)
    tl.store(at + 1, total, mask=inside)
    tl.store(at + 2, gap, mask=inside)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    if SMOOTH:
        mass += end - begin
    tl.store(at + 3, mass, mask=inside)
    here = inside & (labels >= begin) & (labels < end)
    tl.store(label_logits_ptr + slots, own, mask=here)


@triton.jit
def _dlogits_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
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
    rows = tl.load(order_ptr + slots, mask=inside, other=0)
    z = _logits(
        *(x_ptr, weight_ptr, bias_ptr, rows, inside, cols, C, V),
        *(PRECISION, BLOCK_M, BLOCK_V, BLOCK_C),
    )
    labels = tl.load(labels_ptr + slots, mask=inside, other=-1)
    peak = tl.load(stats_ptr + slots, mask=inside, other=0.0)
    log_total = tl.load(stats_ptr + N + slots, mask=inside, other=0.0)
    if PER_ROW:
        dy = tl.load(dy_ptr + rows, mask=inside, other=0.0).to(tl.float32)
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


@triton.jit
def _dx_kernel(
    dlogits_ptr,
    weight_ptr,
    order_ptr,
    count_ptr,
    dx_ptr,
    first,
    C,
    V,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx[row] = dlogits @ weight, in tiles of BLOCK_M rows and BLOCK_V columns."""
    columns = tl.cdiv(C, BLOCK_V)
    block = tl.program_id(0) // columns
    count = tl.load(count_ptr)
    if first + block * BLOCK_M >= count:
        return
    local = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = first + local < count
    cols = (tl.program_id(0) % columns) * BLOCK_V + tl.arange(0, BLOCK_V)
    inner = tl.arange(0, BLOCK_C)
    dx = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(0, V, BLOCK_C):
        classes = start + inner
        d = tl.load(
            dlogits_ptr + local[:, None].to(tl.int64) * V + classes[None, :],
            mask=inside[:, None] & (classes < V)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + classes[:, None].to(tl.int64) * C + cols[None, :],
            mask=(classes < V)[:, None] & (cols < C)[None, :],
            other=0.0,
        )
        dx = tl.dot(d, w, dx, input_precision=PRECISION)
    rows = tl.load(order_ptr + first + local, mask=inside, other=0)
    at = dx_ptr + rows[:, None] * C + cols[None, :]
    tl.store(at, dx, mask=inside[:, None] & (cols < C)[None, :])


@triton.jit
def _dweight_kernel(
    dlogits_ptr,
    x_ptr,
    order_ptr,
    count_ptr,
    dweight_ptr,
    dbias_ptr,
    first,
    chunk,
    C,
    V,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight += dlogits^T @ x in tiles of BLOCK_M classes and BLOCK_V columns; dbias likewise."""
    filled = tl.minimum(tl.load(count_ptr) - first, chunk)
    if filled <= 0:
        return
    # Neighbours share the classes: their dlogits come from L2.
    columns = 1
    if dweight_ptr is not None:
        columns = tl.cdiv(C, BLOCK_V)
    classes = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % columns) * BLOCK_V + tl.arange(0, BLOCK_V)
    inner = tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    dbias = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, filled, BLOCK_C):
        local = start + inner
        d = tl.load(
            dlogits_ptr + local[None, :].to(tl.int64) * V + classes[:, None],
            mask=(local < filled)[None, :] & (classes < V)[:, None],
            other=0.0,
        )
        if dbias_ptr is not None:
            dbias += tl.sum(d.to(tl.float32), axis=1)
        if dweight_ptr is not None:
            rows = tl.load(order_ptr + first + local, mask=local < filled, other=0)
            x = tl.load(
                x_ptr + rows[:, None] * C + cols[None, :],
                mask=(local < filled)[:, None] & (cols < C)[None, :],
                other=0.0,
            )
            dweight = tl.dot(d, x, dweight, input_precision=PRECISION)
    if dweight_ptr is not None:
        at = dweight_ptr + classes[:, None].to(tl.int64) * C + cols[None, :]
        mask = (classes < V)[:, None] & (cols < C)[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + dweight, mask=mask)
    if dbias_ptr is not None:
        at = dbias_ptr + classes
        mask = classes < tl.where(tl.program_id(0) % columns == 0, V, 0)
        tl.store(at, tl.load(at, mask=mask, other=0.0) + dbias, mask=mask)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_FLOATS = "partials_ptr", "label_logits_ptr", "stats_ptr", "dweight_ptr", "dbias_ptr"
_OPERANDS = "x_ptr", "weight_ptr", "bias_ptr", "dlogits_ptr", "dx_ptr"
_INTEGERS = "N", "C", "V", "parts", "per_part", "first", "chunk"
_TYPES = {
    **dict.fromkeys(("order_ptr", "labels_ptr"), "*i64"),
    **dict.fromkeys((*_FLOATS, "dy_ptr"), "*fp32"),
    **dict.fromkeys(_INTEGERS, "i32"),
    **dict.fromkeys(("label_smoothing", "z_loss", "softcap"), "fp32"),
    "count_ptr": "*i32",
}
_OPTIONS = {"SMOOTH": True, "CAPPED": False, "PER_ROW": False, "PRECISION": "ieee"}
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
            for name, c in (_OPTIONS | _launch(torch.empty(0, dtype=dtype))).items()
            if name in kernel.arg_names
        },
        num_warps=_launch(torch.empty(0, dtype=dtype))["num_warps"],
        num_stages=_launch(torch.empty(0, dtype=dtype))["num_stages"],
        registers=255,
        **(dict(wgmma=True) if dtype == torch.bfloat16 else {}),
    )
    for kernel in (_parts_kernel, _dlogits_kernel, _dx_kernel, _dweight_kernel)
    for dtype, pointer in ((torch.bfloat16, "*bf16"), (torch.float32, "*fp32"))
]
