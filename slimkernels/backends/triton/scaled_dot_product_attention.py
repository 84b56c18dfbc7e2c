"""Attention in Triton, FlashAttention-2 (Dao 2023): softmax(q @ k^T * scale) @ v.

Tiling    A program owns BLOCK_M queries of one head of one sequence and walks the keys in tiles of
          BLOCK_N. Tiles that causality hides are not visited, and only those at an edge take the
          branch that masks. (Two loops, one masked, would let ptxas serialise Hopper's matrix
          instructions: it says so, C7515.) _attention.py says how ragged sequences are cut.
Traffic   Each operand is read once a program and lse is one float32 a query; the scores are never
          stored. The roof is the tensor cores: 4 * Tq * Tk * D operations a head.
Numerics  A running maximum and sum a query, all sums in float32; exp is exp2 with log2(e) folded
          into the scale. Probabilities are rounded to the values' dtype for the second product, but
          not for their sum. Dropout's 1 / (1 - p) is applied once, to the result. float32 products
          are exact float32 ("ieee"), not TF32.
Launch    grid = (tiles of all sequences, heads). Gradients: _attention_backward.py.
"""

import torch
import triton
import triton.language as tl

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends._dropout import threshold
from slimkernels.backends.triton._attention import (
    LOWEST,
    Lengths,
    Rows,
    Statistics,
    dropout_keys,
    exp_of,
    load_tile,
    query_tile,
    rows_of,
    scale_early,
    sees,
    store_tile,
    tiles_of,
)
from slimkernels.backends.triton._attention_backward import (
    _delta_kernel,
    _dkdv_kernel,
    _dq_kernel,
    _row_sums_kernel,
)
from slimkernels.backends.triton._common import keep_mask, unsupported_tensor

MAX_WIDTH = 256  # a tile of wider heads does not fit one program's registers

# BLOCK_M, BLOCK_N, num_warps, num_stages, by the largest BLOCK_D they are for: as much as the
# registers of sm_80, sm_90 and sm_100 hold (COMPILES, below, keeps them to it).
_HALF = {
    "forward": {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (64, 64, 4, 2), 256: (64, 16, 4, 2)},
    "dkdv": {64: (32, 128, 8, 3), 128: (64, 64, 8, 2), 256: (16, 64, 8, 2)},
}
_FLOAT = {
    "forward": {64: (64, 64, 8, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 2)},
    "dq": {64: (64, 32, 8, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 2)},
    "dkdv": {64: (16, 32, 8, 2), 128: (16, 32, 8, 2), 256: (16, 16, 8, 2)},
}


def unsupported(query, key, value, call):
    if call.is_modified or call.mask is not None or call.sinks is not None or call.function:
        return "it has plain scores only"
    if call.left >= 0 or call.right > 0 or call.causal_offset or call.causal_offsets is not None:
        return "it has no window"
    if value.shape[-1] != query.shape[-1]:
        return "value must be as wide as query"
    if query.shape[-1] > MAX_WIDTH:
        return f"a head may be at most {MAX_WIDTH} wide and has {query.shape[-1]}"
    return unsupported_tensor(query)


def forward(query, key, value, call):
    key_lengths, _, cu_seqlens_q, cu_seqlens_k, seed = call[6:11]
    scale, dropout_p, is_causal = call.scale, call.dropout_p, call.right == 0
    query, key, value = (with_whole_rows(t) for t in (query, key, value))
    if scale < 0:  # the largest score is scale times the largest product only if scale > 0
        query, scale = -query, -scale
    y = torch.empty_like(query, memory_format=torch.contiguous_format)
    H, Tq, Tk, group = _sizes(query, key)
    rows = (H, Tq) if cu_seqlens_q is not None else query.shape[:-1]
    lse = query.new_empty(rows, dtype=torch.float32)
    if y.numel():
        lengths = _lengths(key_lengths, cu_seqlens_q, cu_seqlens_k)
        launch = _launch("forward", query.shape[-1], query.dtype)
        _forward_kernel[(tiles_of(query, lengths.cu_q, launch["BLOCK_M"]), H)](
            *(rows_of(t) for t in (query, key, value, y)),
            *(lse, lengths, seed, *_dropout(dropout_p), Tq, Tk, group),
            scale or 1e-30,  # not 0, which would make NaN of -inf, a hidden score
            IS_CAUSAL=is_causal,
            **launch,
        )
    return y, lse


def backward(dy, dlse, query, key, value, output, lse, call, wanted):
    if dlse is not None:
        raise NotImplementedError("scaled_dot_product_attention: lse has no gradient here yet")
    key_lengths, _, cu_seqlens_q, cu_seqlens_k, seed = call[6:11]
    scale, dropout_p, is_causal = call.scale, call.dropout_p, call.right == 0
    dy, query, key, value = (with_whole_rows(t) for t in (dy, query, key, value))
    output, lse = output.contiguous(), lse.contiguous()
    dq, dk, dv = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)
    )
    is_float = query.dtype == torch.float32
    delta, total = torch.empty_like(lse), torch.empty_like(lse) if is_float else None
    lengths = _lengths(key_lengths, cu_seqlens_q, cu_seqlens_k)
    H, Tq, Tk, group = _sizes(query, key)
    shared = (
        *(Statistics(lse, delta, total), lengths, seed, *_dropout(dropout_p)),
        *(Tq, Tk, group, scale),
    )
    if query.numel():
        launch = _launch("dq", query.shape[-1], query.dtype)
        grid = tiles_of(query, lengths.cu_q, launch["BLOCK_M"]), H
        if is_float:
            _row_sums_kernel[grid](
                *(rows_of(t) for t in (dy, output, query, key, value)),
                *shared,
                IS_CAUSAL=is_causal,
                **launch,
            )
        else:
            blocks = dict(BLOCK_M=launch["BLOCK_M"], BLOCK_D=launch["BLOCK_D"])
            tiles = (1 if query.dim() == 3 else len(query)) * triton.cdiv(Tq, blocks["BLOCK_M"])
            _delta_kernel[(tiles, H)](
                *(rows_of(dy), rows_of(output), delta, Tq), D=query.shape[-1], **blocks
            )
        _dq_kernel[grid](
            *(rows_of(t) for t in (dy, query, key, value, dq)),
            *shared,
            IS_CAUSAL=is_causal,
            **launch,
        )
    if key.numel():
        launch = _launch("dkdv", query.shape[-1], query.dtype)
        _dkdv_kernel[(tiles_of(key, lengths.cu_k, launch["BLOCK_N"]), H // group)](
            *(rows_of(t) for t in (dy, query, key, value, dk, dv)),
            *shared,
            IS_CAUSAL=is_causal,
            **launch,
        )
    return dq, dk, dv, None, None, None


def _sizes(query, key):
    """H, Tq, Tk, and how many query heads read one key head."""
    tokens, heads = (0, 1) if query.dim() == 3 else (2, 1)
    H = query.shape[heads]
    return H, query.shape[tokens], key.shape[tokens], H // key.shape[heads]


def _lengths(*integers):
    return Lengths(*(None if t is None else t.contiguous() for t in integers))


def _dropout(dropout_p):
    """threshold and factor of a kernel."""
    return threshold(dropout_p), 1 / (1 - dropout_p)


def _launch(direction, D, dtype):
    BLOCK_D = max(triton.next_power_of_2(D), 16)  # tl.dot sums over 16 or more
    table = (_FLOAT if dtype == torch.float32 else _HALF)[direction]
    BLOCK_M, BLOCK_N, num_warps, num_stages = table[max(BLOCK_D, 64)]
    blocks = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D)
    return dict(D=D, **blocks, num_warps=num_warps, num_stages=num_stages)


# Not specialised: one compiled kernel serves all lengths and rates, 1, 16 and 17 alike.
@triton.jit(do_not_specialize=["Tq", "Tk", "threshold"])
def _forward_kernel(
    q,
    k,
    v,
    y,
    lse_ptr,
    lengths,
    seed_ptr,
    threshold,
    factor,
    Tq,
    Tk,
    group,
    scale,
    IS_CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    H = tl.num_programs(1)
    batch, q_begin, k_begin, first, q_count, whole, seen = query_tile(
        Tq, Tk, lengths, IS_CAUSAL, BLOCK_M, BLOCK_N
    )
    if first >= q_count:
        return
    i = first + tl.arange(0, BLOCK_M)  # queries, and j keys, are counted within the sequence
    present = i < q_count
    tokens = q_begin + i
    queries = load_tile(q, batch, head, q_begin + first, present, D, BLOCK_M, BLOCK_D)
    queries, late = scale_early(queries, scale)
    if seed_ptr is not None:
        key0, key1 = dropout_keys(seed_ptr, batch, head, tokens, H, Tq, lengths.cu_q is not None)

    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, seen, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        keys = load_tile(k, batch, head // group, k_begin + start, j < seen, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(queries, keys.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if start >= whole:
            scores = tl.where(sees(i, j, seen, IS_CAUSAL), scores, -float("inf"))
        raised = tl.maximum(peak, tl.max(scores, axis=1) * late)
        p = exp_of(scores, late, raised[:, None], queries.dtype)
        shrink = tl.exp(peak - raised)
        peak = raised
        total = total * shrink + tl.sum(p, axis=1)
        if seed_ptr is not None:
            keep = keep_mask(key0[:, None], key1[:, None], j[None, :], threshold)
            p = tl.where(keep, p, 0.0)
        values = load_tile(v, batch, head // group, k_begin + start, j < seen, D, BLOCK_N, BLOCK_D)
        sums = sums * shrink[:, None]
        sums = tl.dot(p.to(values.dtype), values, sums, input_precision="ieee")

    total = tl.where(total == 0.0, 1.0, total)  # no key, or only scores of -inf: y is 0
    sums *= (factor / total)[:, None]
    store_tile(sums, y, batch, head, q_begin + first, present, D)
    lse = tl.where(peak == LOWEST, -float("inf"), peak + tl.log(total))
    tl.store(lse_ptr + (batch * H + head) * Tq + tokens, lse, mask=present)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
def _compiled(kernel, direction, D, dtype, *, dropout, **most):
    """An entry: causal, ragged, one query head a key head."""
    is_float = dtype == torch.float32
    operand = Rows("*fp32" if is_float else "*bf16", "i32", "i32", "i32")
    types = {
        **dict.fromkeys(("q", "k", "v", "y", "dy", "dq", "dk", "dv"), operand),
        **dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32"),
        "statistics": Statistics("*fp32", "*fp32", "*fp32" if is_float else None),
        "lengths": Lengths(None, "*i32", "*i32"),
        **({"seed_ptr": "*i64"} if dropout else {}),
        **dict.fromkeys(("factor", "scale"), "fp32"),
        **dict.fromkeys(("threshold", "Tq", "Tk", "T"), "i32/1"),
    }
    launch = _launch(direction, D, dtype)
    constants = {"IS_CAUSAL": True, "group": 1, **launch, **({} if dropout else {"seed_ptr": None})}
    return dict(
        kernel=kernel,
        signature={n: t for n, t in types.items() if n in kernel.arg_names},
        constexprs={n: c for n, c in constants.items() if n in kernel.arg_names},
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        **most,
    )


_MATRIX = dict(registers=255, wgmma=True)
COMPILES = [
    *(
        _compiled(kernel, direction, D, torch.bfloat16, dropout=D == 64, smem=KIB * 1024, **_MATRIX)
        for kernel, direction, KIB_by_D in (
            (_forward_kernel, "forward", {64: 82, 128: 98, 256: 130}),
            (_dq_kernel, "dq", {64: 73, 128: 113, 256: 105}),
            (_dkdv_kernel, "dkdv", {64: 65, 128: 129, 256: 113}),
        )
        for D, KIB in KIB_by_D.items()
    ),
    *(
        _compiled(kernel, direction, 64, torch.float32, dropout=True, registers=registers)
        for kernel, direction, registers in (
            (_forward_kernel, "forward", 128),
            (_row_sums_kernel, "dq", 128),
            (_dq_kernel, "dq", 128),
            (_dkdv_kernel, "dkdv", 255),
        )
    ),
    _compiled(_delta_kernel, "dq", 128, torch.bfloat16, dropout=False, registers=80),
]
