"""The gradient of a table of which rows were looked up: dtable[v] = sum of dsum over v's tokens.

Tiling    Tokens are sorted by id, stably, and cut into blocks of BLOCK_M tokens. The tokens of one
          id in one block are a run, and a run has one program for each BLOCK_N columns. An id with
          one run has its row of dtable from there; the sums of longer ones' runs are stored, and
          added up by the program of the first. So no row has two writers and none one serial
          program, there are no atomics, and the bits are the same on every run.
Traffic   dtable is set to 0, dsum read once; two rows of partial sums a block at the most.
Numerics  float32 sums, rounded once.
"""

import torch
import triton
import triton.language as tl

BLOCK_M = 32  # tokens; the partial sums are at most 2 rows in 32
RUNS = 16  # partial sums that are added at a time


def table_gradient(dsum, ids, rows, dtype, padding_idx):
    M, N = ids.numel(), dsum.shape[-1]
    dtable = dsum.new_zeros((rows, N), dtype=dtype)
    if M == 0:
        return dtable
    dsum = dsum.contiguous()
    ids, order = ids.flatten().sort(stable=True)
    blocks, BLOCK_N = triton.cdiv(M, BLOCK_M), min(triton.next_power_of_2(N), 256)
    partials = dsum.new_empty((blocks, 2, N), dtype=torch.float32)
    grid_n = triton.cdiv(N, BLOCK_N)
    numbers = M, N, rows, padding_idx
    _run_kernel[(M, grid_n)](
        *(dsum, order, ids, dtable, partials, *numbers), BLOCK_M, BLOCK_N, num_warps=1
    )
    _finish_kernel[(blocks, grid_n)](
        *(ids, dtable, partials, *numbers), BLOCK_M, BLOCK_N, RUNS, num_warps=4
    )
    return dtable


@triton.jit
def _run_kernel(
    dsum_ptr,
    order_ptr,
    ids_ptr,
    dtable_ptr,
    partials_ptr,
    M,
    N,
    rows,
    padding_idx,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums the run that begins at a token in the order of the ids, if one does."""
    first = tl.program_id(0)
    start = first // BLOCK_M * BLOCK_M
    id = tl.load(ids_ptr + first).to(tl.int64)
    is_first = (first == 0) | (tl.load(ids_ptr + tl.maximum(first - 1, 0)).to(tl.int64) != id)
    if (id < 0) | (id >= rows) | (id == padding_idx) | ((first > start) & (is_first == 0)):
        return
    places = start + tl.arange(0, BLOCK_M)
    block_ids = tl.load(ids_ptr + places, mask=places < M, other=-1).to(tl.int64)
    length = tl.sum((block_ids == id).to(tl.int32), axis=0)
    end = first + length
    is_last = (end == M) | (tl.load(ids_ptr + tl.minimum(end, M - 1)).to(tl.int64) != id)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for place in range(first, end):
        token = tl.load(order_ptr + place)
        total += tl.load(dsum_ptr + token * N + cols, mask=mask, other=0.0).to(tl.float32)
    if is_first & is_last:
        tl.store(dtable_ptr + id * N + cols, total, mask=mask)
    else:
        # A block's first run is that of an id begun before it, or its last: two slots do.
        slot = (start // BLOCK_M).to(tl.int64) * 2 + (first > start).to(tl.int32)
        tl.store(partials_ptr + slot * N + cols, total, mask=mask)


@triton.jit
def _finish_kernel(
    ids_ptr,
    dtable_ptr,
    partials_ptr,
    M,
    N,
    rows,
    padding_idx,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Adds up the runs of the id that begins in a block and goes on in the next, if one does."""
    block = tl.program_id(0)
    start = block * BLOCK_M
    end = start + BLOCK_M
    if end >= M:
        return
    id = tl.load(ids_ptr + end).to(tl.int64)
    places = start + tl.arange(0, BLOCK_M)
    block_ids = tl.load(ids_ptr + places).to(tl.int64)
    length = tl.sum((block_ids == id).to(tl.int32), axis=0)
    before = tl.load(ids_ptr + tl.maximum(start - 1, 0)).to(tl.int64)
    begins = (length > 0) & ((length < BLOCK_M) | (start == 0) | (before != id))
    if (id < 0) | (id >= rows) | (id == padding_idx) | (begins == 0):
        return
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    slot = block.to(tl.int64) * 2 + (length < BLOCK_M).to(tl.int32)
    total = tl.load(partials_ptr + slot * N + cols, mask=mask, other=0.0)
    more = block + 1
    count = RUNS
    while count == RUNS:
        blocks = more + tl.arange(0, RUNS)
        inside = blocks * BLOCK_M < M
        same = inside & (tl.load(ids_ptr + blocks * BLOCK_M, mask=inside, other=-1) == id)
        at = blocks[:, None].to(tl.int64) * 2 * N + cols[None, :]
        runs = tl.load(partials_ptr + at, mask=same[:, None] & mask[None, :], other=0.0)
        total += tl.sum(runs, axis=0)
        count = tl.sum(same.to(tl.int32), axis=0)
        more += RUNS
    tl.store(dtable_ptr + id * N + cols, total, mask=mask)


# What embedding.py's COMPILES hands on to tests/test_aot.py.
COMPILES = [
    dict(
        kernel=kernel,
        signature={
            name: kind
            for name, kind in {
                **dict(dsum_ptr=kind, order_ptr="*i64", ids_ptr="*i64", dtable_ptr=kind),
                "partials_ptr": "*fp32",
                **dict.fromkeys(("M", "N", "rows", "padding_idx"), "i32"),
            }.items()
            if name in kernel.arg_names
        },
        constexprs={
            **dict(BLOCK_M=BLOCK_M, BLOCK_N=256),
            **({"RUNS": RUNS} if kernel is _finish_kernel else {}),
        },
        num_warps=num_warps,
        registers=64,
    )
    for kind in ("*bf16", "*fp32")
    for kernel, num_warps in ((_run_kernel, 1), (_finish_kernel, 4))
]
