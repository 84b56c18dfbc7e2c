"""What a call of attention may ask for beside query, key and value, and its canonical form."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slimkernels.ops._checks import check_flag, check_integer
from slimkernels.ops._score_function import ScoreFunction


class RelativeBias(NamedTuple):
    """A learned bias that depends on how far the key is from the query, read from a small table.

    table    (buckets, H) float32 or query's dtype; gets a gradient
    buckets  (2 * m + 1,) int32: the row of the table for each distance j - i from -m to m, where
             i is the query's position with causal_offset added; farther keys share the last's
    """

    table: Tensor
    buckets: Tensor


def t5_relative_bias(
    table: Tensor, *, bidirectional: bool = True, max_distance: int = 128
) -> RelativeBias:
    """T5's relative position bias (Raffel et al. 2020): exact near buckets, logarithmic far ones.

    table          (buckets, H): T5's relative_attention_bias.weight
    bidirectional  an encoder's: half of the buckets are for keys after the query. False, as in a
                   decoder, puts all later keys, which causality hides, in bucket 0
    max_distance   distances from here on share the last bucket; 2 * max_distance + 1 integers
    Returns        a RelativeBias, for AttentionVariant.relative_bias
    Errors         ValueError for a bidirectional that is no bool, too few buckets or too small a
                   max_distance
    """
    if not isinstance(table, Tensor) or table.dim() != 2:
        got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"t5_relative_bias: table must be (buckets, H); got {got}")
    check_flag("t5_relative_bias", "bidirectional", bidirectional)
    count = table.shape[0] // 2 if bidirectional else table.shape[0]
    exact = count // 2
    if exact < 1:
        raise ValueError(
            f"t5_relative_bias: table must have {4 if bidirectional else 2} buckets or more; "
            f"got {table.shape[0]}"
        )
    check_integer("t5_relative_bias", "max_distance", max_distance)
    if max_distance <= exact:
        raise ValueError(
            f"t5_relative_bias: max_distance must be above the {exact} exact buckets of "
            f"table {tuple(table.shape)}; got {max_distance}"
        )
    distance = torch.arange(-max_distance, max_distance + 1, device=table.device)
    far = distance.abs() if bidirectional else (-distance).clamp(min=0)
    # In float32, as the models that trained the table did, which decides the borders.
    ratio = (far.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    rows = (exact + (ratio * (count - exact)).int()).clamp(max=count - 1)
    rows = torch.where(far < exact, far, rows)
    if bidirectional:
        rows = rows + count * (distance > 0)
    return RelativeBias(table, rows.int())


class AttentionVariant(NamedTuple):
    """What attention may do to its scores; all of it together if need be, in this order.

    With i the position of a query (causal_offset added) and j that of a key in their sequence,

        s = scale * query @ key^T          then  s = softcap * tanh(s / softcap)
        s = s + attn_mask + bias - alibi_slope * |i - j| + table[bucket(j - i)]
        s = score function(s)              then  s = -inf where a mask, a length, a window hides j
        lse = log(sum_j exp(s) + exp(sink))      output = dropout(exp(s - lse)) @ value

    bias               floating, broadcasts to (B, H, Tq, Tk); gets a gradient of its own shape. For
                       when attn_mask is bool; a floating attn_mask is the same thing
    window             (left, right): query i sees keys i - left <= j <= i + right; None there for
                       no limit
    causal_offset      int, or (B,) int32: added to the position of every query. Tk - Tq aligns the
                       last query with the last key, as decoding with a cache needs
    alibi_slopes       (H,) or (B, H) float32 (Press et al. 2022); no gradient
    softcap            above 0, as in Gemma 2
    sinks              (H,) float32 or query's dtype: a score with no value, which takes
                       probability; gets a gradient
    relative_bias      RelativeBias, such as t5_relative_bias(table) makes
    score              ScoreFunction; score_tensors are handed to it and get no gradient
    float32_precision  "ieee", or "tf32": float32 products on tensor cores with 10 bits of mantissa
                       (GPU only)
    batch_invariant    a row's bits do not depend on what else is in the batch, at the price of
                       some speed when decoding

    With ragged batches B counts sequences, and Tq and Tk are the longest: a bias or mask is
    indexed by the positions in the sequence, and hides what lies past its end.
    """

    bias: Tensor | None = None
    window: tuple[int | None, int | None] | None = None
    causal_offset: int | Tensor = 0
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    relative_bias: RelativeBias | None = None
    score: ScoreFunction | None = None
    score_tensors: tuple[Tensor, ...] = ()
    float32_precision: str = "ieee"
    batch_invariant: bool = False


class Call(NamedTuple):
    """A checked call in canonical form: what the definition and every backend take.

    The first three may get gradients. A tensor is None where the call has no such thing.
    """

    bias: Tensor | None  # (B or 1, H or 1, Tq or 1, Tk or 1)
    sinks: Tensor | None  # (H,)
    table: Tensor | None  # (buckets, H)
    buckets: Tensor | None  # (2 * m + 1,) int32
    mask: Tensor | None  # bool, shaped like bias
    alibi_slopes: Tensor | None  # (B or 1, H) float32
    key_lengths: Tensor | None  # (B,) int32
    causal_offsets: Tensor | None  # (B,) int32
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None  # (1,) int64, where dropout_p > 0 and the call runs
    scale: float
    softcap: float  # 0 for none
    dropout_p: float
    left: int  # i - left <= j <= i + right; -1 for no limit. Causality is right = 0
    right: int
    causal_offset: int  # where causal_offsets is None
    tf32: bool
    batch_invariant: bool
    function: ScoreFunction | None
    function_tensors: tuple[Tensor, ...]

    @property
    def ragged(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:_TENSORS] + self.function_tensors

    @property
    def is_modified(self) -> bool:
        """Whether scores are more than scale * query @ key^T."""
        return bool(self.softcap) or any(
            t is not None for t in (self.bias, self.table, self.alibi_slopes, self._score)
        )

    @property
    def _score(self):
        return None if self.function is None else self.function.score

    def flat(self) -> tuple:
        """Tensors and constants alone, for an autograd Function; from_flat() is the way back."""
        name = "" if self.function is None else self.function.name
        return *self[:-2], name, *self.function_tensors

    @classmethod
    def from_flat(cls, flat: tuple) -> Call:
        fixed = len(cls._fields) - 2
        name = flat[fixed]
        function = ScoreFunction.named(name) if name else None
        return cls(*flat[:fixed], function, tuple(flat[fixed + 1 :]))

    def packed(self) -> tuple[list, list[float], list[int], str]:
        """The parameters of a registered op: tensors, floats, integers, the function's name."""
        flat = self.flat()
        tensors = list(self.tensors)
        floats, integers = flat[_TENSORS : _TENSORS + 3], flat[_TENSORS + 3 : _TENSORS + 8]
        return tensors, list(floats), [int(n) for n in integers], flat[_TENSORS + 8]

    @classmethod
    def unpacked(cls, tensors, floats, integers, name: str) -> Call:
        left, right, offset, tf32, invariant = integers
        flat = *tensors[:_TENSORS], *floats, left, right, offset, bool(tf32), bool(invariant), name
        return cls.from_flat((*flat, *tensors[_TENSORS:]))


_TENSORS = Call._fields.index("scale")
