"""Host side of attention in Triton: a call's arguments as the kernels take them, and tile sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends._dropout import threshold
from slimkernels.backends.triton._attention_terms import (
    Dropout,
    Features,
    Lengths,
    Numbers,
    Ones,
    Operands,
    Plane,
    Rows,
    Scoring,
    Statistics,
    Table,
    Terms,
    Tile,
)
from slimkernels.backends.triton._attention_tiles import tiles

MAX_WIDTH = 512  # a tile of wider heads does not fit one program's registers
_EVERYWHERE = 2**31 - 1  # the end of a dimension that is broadcast


def launch_of(
    kernel: str,
    D: int,
    DV: int,
    dtype: torch.dtype,
    rich: bool,
    device: torch.device,
    *,
    is_foreign: bool,
) -> dict:
    """What a kernel's launch needs beside the call's own Features: TILE, num_warps, num_stages.

    is_foreign  the scores go through a user's functions
    """
    BLOCK_D, BLOCK_DV = (max(triton.next_power_of_2(n), 16) for n in (D, DV))  # tl.dot wants 16
    chosen = tiles(kernel, max(BLOCK_D, BLOCK_DV), dtype, rich, device)
    BLOCK_M, BLOCK_N = chosen.pop("BLOCK_M"), chosen.pop("BLOCK_N")
    if is_foreign and kernel == "forward":
        # The tables leave no registers for such functions: on sm_100, even small ones spill.
        BLOCK_N = max(BLOCK_N // 2, 16)
    return dict(TILE=Tile(D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV), **chosen)


class Prepared:
    """One call, with strides, pointers and constants as the kernels take them.

    positive_scale  turn a negative scale into negative queries: the largest score is scale times
                    the largest product only if scale > 0
    """

    def __init__(self, query, key, value, call, *, positive_scale: bool) -> None:
        query, key, value = (with_whole_rows(t) for t in (query, key, value))
        scale = call.scale
        if positive_scale:
            if scale < 0:
                query, scale = -query, -scale
            if scale == 0:  # would make NaN of -inf, a hidden score
                query, scale = query * 0.0, 1.0
        self.query, self.key, self.value, self.call = query, key, value, call
        tokens = 0 if call.ragged else 2
        self.H, self.Tq, self.Tk = query.shape[1], query.shape[tokens], key.shape[tokens]
        self.sequences = call.cu_seqlens_q.shape[0] - 1 if call.ragged else query.shape[0]
        self.group = self.H // key.shape[1]
        self.rows = (self.H, self.Tq) if call.ragged else query.shape[:-1]
        integers = call.key_lengths, call.cu_seqlens_q, call.cu_seqlens_k, call.causal_offsets
        self.lengths = Lengths(*(None if t is None else t.contiguous() for t in integers))
        self.scoring = self._scoring(scale)

    def operands(self, dy: Tensor | None = None, y: Tensor | None = None) -> Operands:
        tensors = self.query, self.key, self.value, dy, y
        return Operands(*(None if t is None else rows_of(t) for t in tensors))

    def shared(self) -> tuple:
        """The run-time parameters that all kernels have in common, in their order."""
        call = self.call
        dropout = Dropout(call.seed, 1 / (1 - call.dropout_p))
        terms = Terms(self.lengths, self.scoring, dropout, self.group)
        band = min(max(call.left, 0), 2**30), min(max(call.right, 0), 2**30), call.causal_offset
        return terms, *Numbers(threshold(call.dropout_p), self.Tq, self.Tk, *band)

    def launch(self, kernel: str) -> dict:
        """The compile-time parameters, num_warps and num_stages."""
        call = self.call
        # What a bias leaves out past its end, where sequences are ragged, it hides.
        ends = call.ragged and call.bias is not None
        masked = call.mask is not None or call.function is not None or ends
        features = Features(
            HAS_LEFT=call.left >= 0,
            HAS_RIGHT=call.right >= 0,
            MODIFIED=call.is_modified,
            MASKED=masked or kernel == "dbias",  # which has no loop worth a branch
            KEYS_END=kernel != "dkdv",
            DERIVED=kernel != "forward",
            PRECISION="tf32" if call.tf32 else "ieee",
        )
        rich = masked or call.is_modified or call.dropout_p > 0
        query, widths = self.query, (self.query.shape[-1], self.value.shape[-1])
        chosen = launch_of(
            *(kernel, *widths, query.dtype, rich, query.device),
            is_foreign=call.function is not None,
        )
        return dict(FEATURES=features) | chosen

    def statistics(self, lse: Tensor, dlse: Tensor | None) -> Statistics:
        """With room for what backward computes first; the sums of P in float32 only."""
        lse, low = lse.contiguous().unbind()
        total = torch.empty_like(lse) if self.query.dtype == torch.float32 else None
        dlse = None if dlse is None else dlse.contiguous()
        return Statistics(lse, low, torch.empty_like(lse), total, dlse, None)

    def _scoring(self, scale: float) -> Scoring:
        call, function, table = self.call, self.call.function, None
        if call.table is not None:
            values = call.table.t().contiguous()  # a head's values side by side
            buckets = call.buckets.contiguous()
            table = Table(values, buckets, values.shape[1], len(buckets) // 2)
        slopes = None if call.alibi_slopes is None else call.alibi_slopes.contiguous()
        sinks = None if call.sinks is None else call.sinks.contiguous()
        mask = None if call.mask is None else call.mask.view(torch.uint8)
        return Scoring(
            scale=scale,
            softcap=call.softcap or None,
            bias=self._plane(call.bias),
            mask=self._plane(mask),
            slopes=slopes,
            slopes_sequence=None if slopes is None else self.H * (len(slopes) > 1),
            table=table,
            sinks=sinks,
            score=function and function.score,
            derivative=function and function.derivative,
            mask_function=function and function.mask,
            tensors=call.function_tensors or None,
        )

    def _plane(self, x: Tensor | None) -> Plane | None:
        if x is None:
            return None
        strides = (s if n > 1 else 0 for n, s in zip(x.shape, x.stride(), strict=True))
        ends = (n if self.call.ragged and n != 1 else _EVERYWHERE for n in x.shape[2:])
        return Plane(x, *strides, *ends)


def rows_of(x: Tensor) -> Rows:
    """x (B, H, T, D), or (T, H, D) if ragged; the elements of a row must be neighbours."""
    return Rows(x, *x.stride()[:3]) if x.dim() == 4 else Rows(x, 0, x.stride(1), x.stride(0))


@triton.jit
def _a_score(score, batch, head, i, j, tensors):
    return score + tl.load(tensors[0] + head)


@triton.jit
def _a_derivative(score, batch, head, i, j, tensors):
    return tl.where(score > 0.0, 1.0, 0.5)


@triton.jit
def _a_mask(batch, head, i, j, tensors):
    return (i - j) % 2 == 0


# Functions as a user may have them.
FUNCTIONS = dict(
    score=_a_score, derivative=_a_derivative, mask_function=_a_mask, tensors=("*fp32",)
)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
def compiled(kernel, direction, D, dtype, *, dropout=False, scoring=None, blocks=None, **most):
    """An entry of COMPILES: causal, ragged, one query head a key head."""
    is_float = dtype == torch.float32
    operand = Rows("*fp32" if is_float else "*bf16", "i32", "i32", "i32")
    statistics = ["*fp32", "*fp32", "*fp32", "*fp32" if is_float else None, None, None]
    if scoring is not None and scoring.table is not None and direction == "dq":
        statistics[-1] = "*fp32"
    types = {
        "x": Operands(*(operand,) * 5),
        **dict.fromkeys(("y", "dq", "dk", "dv"), operand),
        **dict.fromkeys(("lse_ptr", "low_ptr", "parts", "part_lse", "part_low"), "*fp32"),
        "out": operand._replace(ptr="*fp32"),
        "statistics": Statistics(*statistics),
        "terms": Terms(
            Lengths(None, "*i32", "*i32", None),
            scoring or Scoring("fp32"),
            Dropout("*i64" if dropout else None, "fp32"),
            1,
        ),
        "dbias": Plane("*bf16", "i32", "i32", "i32", "i32", "i32", "i32"),
        **dict.fromkeys((*Numbers._fields, "T"), "i32/1"),
        **dict.fromkeys(
            ("sequences", "H", "plane_shares", "tiles", "tile_queries", "split_keys", "count"),
            "i32/1",
        ),
    }
    rich = dropout or scoring is not None
    is_foreign = scoring is not None and scoring.score is not None
    launch = launch_of(*(direction, D, D, dtype, rich, torch.device("cpu")), is_foreign=is_foreign)
    launch["TILE"] = launch["TILE"]._replace(**(blocks or {}))
    features = Features(
        HAS_LEFT=False,
        HAS_RIGHT=True,
        MODIFIED=scoring is not None,
        MASKED=direction == "dbias" or (scoring is not None and scoring.mask_function is not None),
        KEYS_END=direction != "dkdv",
        DERIVED=direction != "forward",
        PRECISION="ieee",
    )
    constants = dict(FEATURES=features, BLOCK_TABLE=32, ONES=Ones(*(False,) * 4))
    constants |= launch | launch["TILE"]._asdict()
    return dict(
        kernel=kernel,
        signature={n: t for n, t in types.items() if n in kernel.arg_names},
        constexprs={n: c for n, c in constants.items() if n in kernel.arg_names},
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        **most,
    )
