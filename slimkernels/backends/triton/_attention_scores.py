"""From products q @ k^T to scores: what a call adds to them, which of them it hides, and exp.

Everything here broadcasts: a tile of scores may be (BLOCK_M, BLOCK_N), with queries i as its rows,
or transposed, and the head a scalar or a column. The plain kernel uses the last three functions
only; each feature is an `if` on a constexpr and costs nothing where it is absent.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from slimkernels.backends.triton._common import tanh

LOG2E = tl.constexpr(1.4426950408889634)
# Where a query's maximum starts, and stays if all its scores are -inf: exp(-inf - LOWEST) is 0, and
# exp(-inf + inf) would be NaN. About the lowest float32 whose product with LOG2E is one, too.
LOWEST = tl.constexpr(-2.3e38)
LEAST = tl.constexpr(-2.2e38)  # of scores that are numbers


class Plane(NamedTuple):
    """A mask or bias: its strides, 0 along a dimension that it is broadcast over, and its ends."""

    ptr: Any
    sequence: Any
    head: Any
    query: Any
    key: Any
    queries: Any
    keys: Any


class Table(NamedTuple):
    """A relative bias: (H, count) values, and the (2 * far + 1,) bucket of each distance."""

    ptr: Any
    buckets: Any
    count: Any
    far: Any


class Scoring(NamedTuple):
    """What becomes of the products; None for what the call does not ask for."""

    scale: Any
    softcap: Any = None
    bias: Any = None  # Plane
    mask: Any = None  # Plane
    slopes: Any = None  # (sequences or 1, H)
    slopes_sequence: Any = None  # its stride
    table: Any = None  # Table
    sinks: Any = None  # (H,)
    tensors: Any = None  # for the user's functions


@triton.jit
def load_plane(plane, sequence, head, i, j, inside):
    """Its elements; 0 where not `inside` and past its ends."""
    inside = inside & (i < plane.queries) & (j < plane.keys)
    start = tl.cast(sequence, tl.int64) * plane.sequence + tl.cast(head, tl.int64) * plane.head
    at = start + i.to(tl.int64) * plane.query + j.to(tl.int64) * plane.key
    return tl.load(plane.ptr + at, mask=inside, other=0)


@triton.jit
def bucket_of(table, distance):
    """The row of a relative bias for keys `distance` after their queries."""
    far = tl.minimum(tl.maximum(distance, -table.far), table.far)
    bucket = tl.load(table.buckets + (far + table.far))
    return tl.minimum(tl.maximum(bucket, 0), table.count - 1)  # on a GPU nobody has checked it


@triton.jit
def added(i, j, place, scoring):
    """What is added to the scores of queries i and keys j: bias, ALiBi, relative bias.

    place  (sequence, head, offset, left, right, q_count, seen), as query_tile() and key_tile() give

    It comes before the product: loads between two of Hopper's asynchronous products would make
    ptxas serialize them (C7515).
    """
    sequence, head, offset, left, right, q_count, seen = place
    total = 0.0
    if scoring.bias is not None:
        inside = (i < q_count) & (j < seen)
        total += load_plane(scoring.bias, sequence, head, i, j, inside).to(tl.float32)
    distance = j - (i + offset)
    if scoring.slopes is not None:
        slope = tl.load(scoring.slopes + (sequence * scoring.slopes_sequence + head))
        total -= slope * tl.abs(distance).to(tl.float32)
    if scoring.table is not None:
        bucket = bucket_of(scoring.table, distance)
        value = tl.load(scoring.table.ptr + (head * scoring.table.count + bucket))
        total += value.to(tl.float32)
    return total


@triton.jit
def modified(
    products, late, extra, i, j, place, scoring, SCORE: tl.constexpr, DERIVATIVE: tl.constexpr
):
    """(score, outer, inner): the score, its derivative by `extra`, which added() gave, and that of
    what `extra` is added to by the product, but for the scale."""
    sequence, head, offset, left, right, q_count, seen = place
    s = products * late
    inner = 1.0
    outer = 1.0
    if scoring.softcap is not None:
        t = tanh(s / scoring.softcap)
        s = scoring.softcap * t
        inner = 1.0 - t * t
    s += extra
    # A mask of -3e38 hides from other keys, but of nothing else every one is seen, as in torch.
    s = tl.where((s < LEAST) & (s > -float("inf")), LEAST, s)
    if SCORE is not None:
        if DERIVATIVE is not None:
            outer = DERIVATIVE(s, sequence, head, i, j, scoring.tensors)
        s = SCORE(s, sequence, head, i, j, scoring.tensors)
    return s, outer, inner


@triton.jit
def sees(
    i,
    j,
    place,
    scoring,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MASK: tl.constexpr,
    KEYS_END: tl.constexpr,
):
    """Which queries i see which keys j. KEYS_END  whether keys may lie past the visible ones"""
    sequence, head, offset, left, right, q_count, seen = place
    visible = j < seen if KEYS_END else j >= 0
    if HAS_RIGHT:
        visible = visible & (j <= i + (offset + right))
    if HAS_LEFT:
        visible = visible & (j >= i + (offset - left))
    if scoring.mask is not None:
        inside = (i < q_count) & (j < seen)
        visible = visible & (load_plane(scoring.mask, sequence, head, i, j, inside) != 0)
    if scoring.bias is not None:  # what lies past its end is hidden
        visible = visible & (i < scoring.bias.queries) & (j < scoring.bias.keys)
    if MASK is not None:
        visible = visible & MASK(sequence, head, i, j, scoring.tensors)
    return visible


@triton.jit
def shown(
    scores,
    hidden,
    i,
    j,
    edge,
    place,
    scoring,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    MASKED: tl.constexpr,
    MASK: tl.constexpr,
    KEYS_END: tl.constexpr,
):
    """`scores` with `hidden` where a query does not see a key: tiles that are no edge need nothing
    but a mask of their own."""
    if MASKED:
        _, _, _, _, _, q_count, _ = place
        visible = sees(i, j, place, scoring, HAS_LEFT, HAS_RIGHT, MASK, KEYS_END)
        visible = visible & (i < q_count)  # a user's function may give NaN for what is not there
        scores = tl.where(visible, scores, hidden)
    else:
        if edge:
            visible = sees(i, j, place, scoring, HAS_LEFT, HAS_RIGHT, MASK, KEYS_END)
            scores = tl.where(visible, scores, hidden)
    return scores


@triton.jit
def through(ds, p, outer, DERIVATIVE: tl.constexpr):
    """dS times a user's derivative, which may be anything where P is 0."""
    if DERIVATIVE is not None:
        ds = tl.where(p == 0.0, 0.0, ds * outer)
    return ds


@triton.jit
def scale_early(queries, scale):
    """float32 queries times scale, whose scores then lack nothing: (queries, 1).

    Scores that are float32 numbers themselves cancel exactly against their maximum and lse; a
    scale applied to them would leave its rounding error. 16-bit queries it would round, so they
    stay: (queries, scale).
    """
    if queries.dtype == tl.float32:
        early = queries * scale
        late = 1.0
    else:
        early = queries
        late = scale
    return early, late


@triton.jit
def split_lse(peak, total):
    """log(sum exp) of a row whose scores reach `peak`, and what its rounding leaves out.

    One float32 cannot tell 1 from n where scores are all near -1e9, as masks have it.
    """
    log = tl.log(total)
    lse = peak + log
    nothing = peak == LOWEST
    return tl.where(nothing, -float("inf"), lse), tl.where(nothing, 0.0, log - (lse - peak))


@triton.jit
def load_lse(statistics, at, present):
    """lse and its rest, such that P is 0 for a query that sees nothing and for an absent one."""
    lse = tl.load(statistics.lse + at, mask=present, other=float("inf"))
    low = tl.load(statistics.low + at, mask=present, other=0.0)
    return tl.maximum(lse, LOWEST), low


@triton.jit
def probability(scores, late, lse, low, EXACT: tl.constexpr, dtype: tl.constexpr):
    """exp(score - lse). EXACT  scores need no scale, and may be as large as a mask makes them"""
    if EXACT or dtype == tl.float32:
        p = tl.exp((scores - lse) - low)
    else:
        p = exp_of(scores, late, lse, dtype)
    return p


@triton.jit
def exp_of(scores, late, shift, dtype: tl.constexpr):
    """exp(scores * late - shift)."""
    if dtype == tl.float32:
        p = tl.exp(scores * late - shift)
    else:  # one FMA and one exp2
        p = tl.exp2(tl.fma(scores, late * LOG2E, -shift * LOG2E))
    return p
