"""The matrix products of linear_cross_entropy in Triton, in tiles: logits, dx and dweight.

Tiling    A tile of a gradient has one owner, which adds it up: the same bits on every run, and no
          atomics. Rows of x are read where they lie, in the order that rows_ptr gives.
Numerics  products add up in float32.
"""

import torch
import triton
import triton.language as tl


def precision():
    """What torch multiplies float32 in."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def launch_of(x, softcap=0.0):
    """The tiles of all products of x, and what they are launched with."""
    if x.dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_V=64, BLOCK_C=16, num_warps=4, num_stages=2)
    # A softcap keeps a second tile beside the logits: of 128 classes it spills 8 bytes on sm_80.
    BLOCK_V = 64 if softcap > 0 else 128
    return dict(BLOCK_M=128, BLOCK_V=BLOCK_V, BLOCK_C=64, num_warps=8, num_stages=3)


def add_products(dlogits, first, chunk, kept, x, weight, gradients):
    """To (dx, dweight, dbias), of which any may be None, what the gradient of the logits of `chunk`
    kept rows adds, from the row `first` on. dx is in the order of the targets."""
    dx, dweight, dbias = gradients
    C, V = x.shape[1], weight.shape[0]
    launch = launch_of(x)
    BLOCK_M, BLOCK_V, BLOCK_C = (launch[name] for name in ("BLOCK_M", "BLOCK_V", "BLOCK_C"))
    if dx is not None:
        blocks = triton.cdiv(min(chunk, dx.shape[0] - first), BLOCK_M) * triton.cdiv(C, BLOCK_V)
        # BLOCK_V columns of dx a tile, BLOCK_C classes at a time: the roles are exchanged.
        dx_kernel[(blocks,)](
            *(dlogits, weight, kept.order, kept.count, dx, first, C, V),
            PRECISION=precision(),
            **launch,
        )
    if dweight is not None or dbias is not None:
        columns = triton.cdiv(C, BLOCK_V) if dweight is not None else 1
        dweight_kernel[(triton.cdiv(V, BLOCK_M) * columns,)](
            *(dlogits, x, kept.rows, kept.count, dweight, dbias, first, chunk, C, V),
            PRECISION=precision(),
            **launch,
        )


@triton.jit
def logits_tile(
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
def dx_kernel(
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
    """dx = dlogits @ weight, in tiles of BLOCK_M rows and BLOCK_V columns."""
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
def dweight_kernel(
    dlogits_ptr,
    x_ptr,
    rows_ptr,
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
            rows = tl.load(rows_ptr + first + local, mask=local < filled, other=0)
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
