"""Host side of attention in Triton: a call's arguments as the kernels take them, and tile sizes."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from slimkernels.backends._attention import with_whole_rows
from slimkernels.backends._dropout import threshold
from slimkernels.backends.triton._attention import Dropout, Lengths, Operands, Rows, Statistics
from slimkernels.backends.triton._attention_scores import Plane, Scoring, Table
from slimkernels.backends.triton._attention_tiles import tiles

MAX_WIDTH = 512  # a tile of wider heads does not fit one program's registers
_EVERYWHERE = 2**31 - 1  # the end of a dimension that is broadcast


def launch_of(
    kernel: str, D: int, DV: int, dtype: torch.dtype, rich: bool, device: torch.device
) -> dict[str, int]:
    """What a kernel's launch needs beside the call's own features."""
    BLOCK_D, BLOCK_DV = (max(triton.next_power_of_2(n), 16) for n in (D, DV))  # tl.dot wants 16
    chosen = tiles(kernel, max(BLOCK_D, BLOCK_DV), dtype, rich, device)
    return dict(D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, **chosen)


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
        band = min(max(call.left, 0), 2**30), min(max(call.right, 0), 2**30), call.causal_offset
        sizes = threshold(call.dropout_p), self.Tq, self.Tk, *band, self.group
        return self.lengths, self.scoring, dropout, *sizes

    def launch(self, kernel: str) -> dict:
        """The compile-time parameters, num_warps and num_stages."""
        call, function = self.call, self.call.function
        features = dict(
            HAS_LEFT=call.left >= 0,
            HAS_RIGHT=call.right >= 0,
            SCORE=function and function.score,
            DERIVATIVE=function and function.derivative,
            MASK=function and function.mask,
            PRECISION="tf32" if call.tf32 else "ieee",
        )
        # What a bias leaves out past its end, where sequences are ragged, it hides.
        ends = call.ragged and call.bias is not None
        masked = call.mask is not None or call.function is not None or ends
        if kernel != "dbias":
            features |= dict(MASKED=masked, MODIFIED=call.is_modified)
        rich = masked or call.is_modified or call.dropout_p > 0
        query, widths = self.query, (self.query.shape[-1], self.value.shape[-1])
        return features | launch_of(kernel, *widths, query.dtype, rich, query.device)

    def statistics(self, lse: Tensor, dlse: Tensor | None) -> Statistics:
        """With room for what backward computes first; the sums of P in float32 only."""
        lse, low = lse.contiguous().unbind()
        total = torch.empty_like(lse) if self.query.dtype == torch.float32 else None
        dlse = None if dlse is None else dlse.contiguous()
        return Statistics(lse, low, torch.empty_like(lse), total, dlse, None)

    def _scoring(self, scale: float) -> Scoring:
        call, table = self.call, None
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


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
def compiled(kernel, direction, D, dtype, *, dropout=False, scoring=None, constants=None, **most):
    """An entry of COMPILES: causal, ragged, one query head a key head."""
    is_float = dtype == torch.float32
    operand = Rows("*fp32" if is_float else "*bf16", "i32", "i32", "i32")
    statistics = ["*fp32", "*fp32", "*fp32", "*fp32" if is_float else None, None, None]
    if scoring is not None and scoring.table is not None and direction == "dq":
        statistics[-1] = "*fp32"
    types = {
        **dict.fromkeys(("y", "dy", "dq", "dk", "dv"), operand),
        **dict.fromkeys(("x",), Operands(*(operand,) * 5)),
        **dict.fromkeys(("lse_ptr", "low_ptr", "parts", "part_lse", "part_low"), "*fp32"),
        "y_ptr": "*bf16",
        "statistics": Statistics(*statistics),
        "lengths": Lengths(None, "*i32", "*i32", None),
        "scoring": scoring or Scoring("fp32"),
        "dropout": Dropout("*i64" if dropout else None, "fp32"),
        "dbias": Plane("*bf16", "i32", "i32", "i32", "i32", "i32", "i32"),
        **dict.fromkeys(("threshold", "Tq", "Tk", "T", "left", "right", "offset"), "i32/1"),
        **dict.fromkeys(("sequences", "H", "B", "count", "split_keys"), "i32/1"),
    }
    rich = dropout or scoring is not None
    launch = launch_of(direction, D, D, dtype, rich, torch.device("cpu"))
    functions = dict.fromkeys(("SCORE", "DERIVATIVE", "MASK"))
    features = dict(HAS_LEFT=False, HAS_RIGHT=True, MODIFIED=scoring is not None, MASKED=False)
    features |= dict(PRECISION="ieee", BLOCK_TABLE=32, group=1) | functions
    features |= dict.fromkeys(("ONE_SEQUENCE", "ONE_HEAD", "ONE_QUERY", "ONE_KEY"), False)
    constants = features | launch | (constants or {})
    return dict(
        kernel=kernel,
        signature={n: t for n, t in types.items() if n in kernel.arg_names},
        constexprs={n: c for n, c in constants.items() if n in kernel.arg_names},
        num_warps=launch["num_warps"],
        num_stages=launch["num_stages"],
        **most,
    )
