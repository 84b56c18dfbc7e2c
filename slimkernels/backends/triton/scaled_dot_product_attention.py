"""Attention in Triton, FlashAttention-2 (Dao 2023): softmax(q @ k^T * scale) @ v.

Tiling    A program owns BLOCK_M queries of one head of one sequence and walks the keys in tiles of
          BLOCK_N. Tiles that causality hides are not visited, and only those at an edge take the
          branch that masks. (Two loops, one masked, would let ptxas serialise Hopper's matrix
          instructions: it says so, C7515.) _attention.py says how ragged sequences are cut, and
          _attention_scores.py what a call may do to its scores.
Traffic   Each operand is read once a program and lse is one float32 a query; the scores are never
          stored. The roof is the tensor cores: 4 * Tq * Tk * D operations a head.
Numerics  A running maximum and sum a query, all sums in float32; exp is exp2 with log2(e) folded
          into the scale. Probabilities are rounded to the values' dtype for the second product, but
          not for their sum. Dropout's 1 / (1 - p) is applied once, to the result. float32 products
          are exact float32 ("ieee"), not TF32.
Launch    grid = (tiles of all sequences, heads). Gradients: _attention_backward.py and
          _attention_bias.py; a few queries on a long cache: _attention_decode.py.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends.triton import _attention_decode
from slimkernels.backends.triton._attention import (
    load_keys,
    load_queries,
    pairs_of,
    query_tile,
    store_tile,
    tiles_of,
    zeros,
)
from slimkernels.backends.triton._attention_backward import (
    _delta_kernel,
    _dkdv_kernel,
    _dq_kernel,
    _row_sums_kernel,
)
from slimkernels.backends.triton._attention_bias import _dbias_kernel, shares_of
from slimkernels.backends.triton._attention_launch import (
    FUNCTIONS,
    MAX_WIDTH,
    Prepared,
    compiled,
    rows_of,
)
from slimkernels.backends.triton._attention_scores import (
    added,
    dropped,
    softmax_end,
    softmax_start,
    softmax_step,
)
from slimkernels.backends.triton._attention_terms import (
    NUMBERS,
    Numbers,
    Ones,
    Plane,
    Scoring,
    Table,
)
from slimkernels.backends.triton._common import unsupported_tensor


def unsupported(query, key, value, call):
    width = max(query.shape[-1], value.shape[-1])
    if width > MAX_WIDTH:
        return f"a head may be at most {MAX_WIDTH} wide and has {width}"
    function = call.function
    if function is not None and function.score is not None and function.derivative is None:
        # The kernels would take it for 1.
        through = query, key, call.bias, call.table
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in through):
            return "the score function has no derivative, which this call's gradients need"
    return unsupported_tensor(query)


def forward(query, key, value, call):
    given = Prepared(query, key, value, call, positive_scale=True)
    y = query.new_empty(*query.shape[:-1], value.shape[-1])
    lse = query.new_empty((2, *given.rows), dtype=torch.float32)
    if y.numel() and _attention_decode.applies(given):
        _attention_decode.forward(given, y, lse)
    elif y.numel():
        launch = given.launch("forward")
        grid = tiles_of(query, call.cu_seqlens_q, launch["TILE"].BLOCK_M), given.H
        _forward_kernel[grid](
            *(given.operands(), rows_of(y), *lse.unbind(), *given.shared()), **launch
        )
    return y, lse


def backward(dy, dlse, query, key, value, output, lse, call, wanted):
    given = Prepared(query, key, value, call, positive_scale=False)
    operands = given.operands(with_whole_rows(dy), output.contiguous())
    statistics = given.statistics(lse, dlse)
    sum_rows(given, operands, statistics)
    dq = dk = dv = dtable = None
    if wanted[0] or wanted[5]:
        dq, dtable = dq_of(given, operands, statistics, wanted[5])
    if wanted[1] or wanted[2]:
        dk, dv = dkdv_of(given, operands, statistics)
    dbias = dbias_of(given, operands, statistics) if wanted[3] else None
    dsinks = _dsinks(call.sinks, statistics) if wanted[4] else None
    return dq, dk, dv, dbias, dsinks, dtable


# Each launch by itself, as `slimkernels tune` measures them (_attention_tuning.py).
def sum_rows(given, operands, statistics):
    """Fill statistics.delta, and statistics.total if there is one."""
    query, call = given.query, given.call
    if not query.numel():
        return
    launch = given.launch("dq")
    if statistics.total is not None:
        grid = tiles_of(query, call.cu_seqlens_q, launch["TILE"].BLOCK_M), given.H
        _row_sums_kernel[grid](operands, statistics, *given.shared(), **launch)
        return
    rows = 1 if call.ragged else query.shape[0]
    _delta_kernel[(rows * triton.cdiv(given.Tq, 32), given.H)](
        *(operands, statistics, given.Tq),
        **dict(DV=launch["TILE"].DV, BLOCK_M=32, BLOCK_DV=launch["TILE"].BLOCK_DV),
    )


def dq_of(given, operands, statistics, with_table):
    """dq, and the gradient of the relative bias's table or None."""
    query, call = given.query, given.call
    dq = _empty_like(query)
    launch = given.launch("dq")
    grid = tiles_of(query, call.cu_seqlens_q, launch["TILE"].BLOCK_M), given.H
    shares, BLOCK_TABLE = None, 1
    if with_table:  # a tile's share; tiles left over write none
        BLOCK_TABLE = triton.next_power_of_2(call.table.shape[0])
        shares = torch.zeros(*grid, BLOCK_TABLE, dtype=torch.float32, device=query.device)
    if query.numel():
        statistics = statistics._replace(dtable=shares)
        _dq_kernel[grid](
            *(operands, rows_of(dq), statistics, *given.shared()),
            **{"BLOCK_TABLE": BLOCK_TABLE, **launch},
        )
    if not with_table:
        return dq, None
    table = shares.sum(0)[:, : call.table.shape[0]].t().to(call.table.dtype)
    return dq, table.clone(memory_format=torch.contiguous_format)


def dkdv_of(given, operands, statistics):
    key, value = given.key, given.value
    dk, dv = _empty_like(key), _empty_like(value)
    if key.numel():
        launch = given.launch("dkdv")
        grid = (
            tiles_of(key, given.call.cu_seqlens_k, launch["TILE"].BLOCK_N),
            given.H // given.group,
        )
        _dkdv_kernel[grid](
            *(operands, rows_of(dk), rows_of(dv), statistics, *given.shared()), **launch
        )
    return dk, dv


def dbias_of(given, operands, statistics):
    bias = given.call.bias
    dbias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    is_empty = not (dbias.numel() and given.query.numel() and given.key.numel())
    if is_empty or given.sequences == 0:
        return dbias
    launch = given.launch("dbias")
    tile = launch["TILE"]
    tiles = triton.cdiv(bias.shape[2], tile.BLOCK_M), triton.cdiv(bias.shape[3], tile.BLOCK_N)
    programs = bias.shape[0] * bias.shape[1] * tiles[0], tiles[1]
    of_planes, of_queries = shares_of(given, tile, programs[0] * programs[1])
    shares = dbias[None]
    if of_planes * of_queries > 1:
        shares = bias.new_empty((of_planes * of_queries, *bias.shape), dtype=torch.float32)
    _dbias_kernel[(*programs, len(shares))](
        *(operands, Plane(shares, *dbias.stride(), *dbias.shape[2:]), statistics),
        *(*given.shared(), given.sequences, given.H, of_planes),
        **{"ONES": Ones(*(n == 1 for n in bias.shape)), **launch},
    )
    return dbias if len(shares) == 1 else shares.sum(0).to(bias.dtype)


def _empty_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dsinks(sinks, statistics):
    """A sink's dP is 0, so its dS is -P * delta."""
    wide = sinks.float()[:, None]
    # A row that sees nothing, not even a sink above -inf, has no P.
    p = ((wide - statistics.lse) - statistics.low).exp()
    p = torch.where(statistics.lse == -torch.inf, 0.0, p)
    if statistics.total is not None:
        p = p / statistics.total
    of_rows = (p * statistics.delta).transpose(0, -2).flatten(1)  # (H, all rows)
    return -of_rows.sum(1).to(sinks.dtype)


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    x,
    y,
    lse_ptr,
    low_ptr,
    terms,
    threshold,
    Tq,
    Tk,
    left,
    right,
    offset,
    FEATURES: tl.constexpr,
    TILE: tl.constexpr,
):
    numbers = Numbers(threshold, Tq, Tk, left, right, offset)
    head = tl.program_id(1).to(tl.int64)
    place, first, span = query_tile(terms, numbers, FEATURES, TILE)
    if first >= place.q_count:
        return
    H = tl.num_programs(1)
    queries = load_queries(x.q, head, H, first, place, terms, numbers, TILE, 1)
    peak, total = softmax_start(head, True, terms, TILE.BLOCK_M)
    sums = zeros(TILE.BLOCK_M, TILE.BLOCK_DV)
    for start in range(span.begin, span.end, TILE.BLOCK_N):
        key_head = head // terms.group
        keys = load_keys(x.k, key_head, start, place, TILE.D, TILE.BLOCK_N, TILE.BLOCK_D)
        pairs = pairs_of(queries, start, span, head, place, TILE.BLOCK_N)
        extra = added(pairs, terms.scoring, FEATURES)
        products = tl.dot(queries.q, keys.T, input_precision=FEATURES.PRECISION)
        p, shrink, peak, total = softmax_step(
            products, extra, queries, peak, total, pairs, terms, FEATURES
        )
        p = dropped(p, queries, pairs, 1.0, terms, numbers)
        values = load_keys(x.v, key_head, start, place, TILE.DV, TILE.BLOCK_N, TILE.BLOCK_DV)
        sums = sums * shrink[:, None]
        sums = tl.dot(p.to(values.dtype), values, sums, input_precision=FEATURES.PRECISION)

    sums, lse, low = softmax_end(sums, peak, total, terms)
    store_tile(sums, y, place.batch, head, queries.token, queries.present, TILE.DV)
    tl.store(lse_ptr + queries.at, lse, mask=queries.present)
    tl.store(low_ptr + queries.at, low, mask=queries.present)


# What tests/test_aot.py compiles, and the most that may come out.
_MATRIX = dict(registers=255, wgmma=True)
_KERNELS = {"forward": _forward_kernel, "dq": _dq_kernel, "dkdv": _dkdv_kernel}
_PLANE = Plane("*bf16", "i32", "i32", "i32", "i32/1", "i32/1", "i32/1")
_TABLE = Table("*fp32", "*i32", "i32", "i32")
_FEATURES = (
    Scoring("fp32", softcap="fp32", sinks="*fp32"),
    Scoring("fp32", bias=_PLANE),
    Scoring("fp32", slopes="*fp32", slopes_sequence="i32", table=_TABLE),
)
_BF16, _FP32 = torch.bfloat16, torch.float32
COMPILES = [
    *(
        compiled(kernel, name, D, _BF16, dropout=dropout, **_MATRIX)
        for name, kernel in _KERNELS.items()
        for D in (64, 128)
        for dropout in (False, True)
    ),
    *(
        compiled(
            *(kernel, name, D, _BF16),
            scoring=scoring,
            dropout=dropout,
            # Triton 3.9 moves the bias's loads behind the product that they stand before.
            **_MATRIX | (dict(may_wait="newer") if scoring.bias is not None else {}),
        )
        for name, kernel in (_KERNELS | {"dbias": _dbias_kernel}).items()
        for D in (64, 128)
        for scoring, dropout in zip(_FEATURES, (False, True, False), strict=True)
    ),
    *(
        compiled(
            *(kernel, name, 64, _BF16),
            scoring=Scoring("fp32", **FUNCTIONS),
            # The functions load, too, and for dq even 3.6 has that between two products.
            may_wait="any" if name == "dq" else "newer",
            **_MATRIX,
        )
        for name, kernel in _KERNELS.items()
    ),
    *(
        compiled(kernel, name, D, _BF16, registers=255)
        for name, kernel in _KERNELS.items()
        for D in (256, 512)
    ),
    *(
        compiled(kernel, name, D, _FP32, dropout=D == 64, registers=255)
        for name, kernel in (_KERNELS | {"dq": _row_sums_kernel}).items()
        for D in (64, 128)
    ),
    *(
        compiled(
            *(_dq_kernel, "dq", D, _FP32),
            scoring=_FEATURES[1],
            registers=255,
            narrow=dict(load=8 if D == 64 else 0, why="a bias may have any stride between keys"),
        )
        for D in (64, 128)
    ),
    *(
        compiled(
            *(_attention_decode._split_kernel, "forward", D, _BF16),
            scoring=_FEATURES[1],
            blocks=dict(BLOCK_M=16, BLOCK_N=64),
            registers=255,
            narrow=dict(
                load=5 if D == 64 else 4,
                why="a step's few queries are 8 bytes a thread; a bias may have any stride",
            ),
        )
        for D in (64, 128)
    ),
    compiled(
        *(_attention_decode._merge_kernel, "forward", 128, _BF16),
        blocks=dict(BLOCK_DV=128),
        registers=64,
        narrow=dict(why="a row of one head is a float a lane"),
    ),
    compiled(_delta_kernel, "dq", 128, _BF16, blocks=dict(BLOCK_M=32), registers=80),
]
