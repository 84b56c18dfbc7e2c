"""From products q @ k^T to P, forward and backward: the steps that all of attention's kernels take.

Everything here broadcasts: a tile of scores may be (BLOCK_M, BLOCK_N), with queries i as its rows,
or transposed, and the head a scalar or a column. Each feature is an `if` on a constant and costs
nothing where it is absent. First the steps, then what they consist of. (Triton cannot assign a
tuple that holds a function: a Scoring is only ever handed on.)
"""

import triton
import triton.language as tl

from slimkernels.backends.triton._attention_terms import Known
from slimkernels.backends.triton._common import keep_mask, slope_of_tanh, tanh

LOG2E = tl.constexpr(1.4426950408889634)
# Where a query's maximum starts, and stays if all its scores are -inf: exp(-inf - LOWEST) is 0, and
# exp(-inf + inf) would be NaN. About the lowest float32 whose product with LOG2E is one, too.
LOWEST = tl.constexpr(-2.3e38)
LEAST = tl.constexpr(-2.2e38)  # of scores that are numbers


@triton.jit
def softmax_start(head, counts, terms, BLOCK_M: tl.constexpr):
    """The maximum and sum of no keys. counts  whether the sink does: a score without a value"""
    peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if terms.scoring.sinks is not None:
        sink = tl.load(terms.scoring.sinks + head).to(tl.float32)
        peak = tl.where(counts, tl.maximum(peak, sink), peak)
        total += tl.where(counts, 1.0, 0.0)
    return peak, total


@triton.jit
def softmax_step(products, extra, queries, peak, total, pairs, terms, FEATURES: tl.constexpr):
    """The running softmax: exp(scores - the new maximum), by how much that shrinks what was summed
    before, and the new maximum and sum."""
    scores, outer, inner = modified(products, extra, queries.late, pairs, terms.scoring, FEATURES)
    scores = shown(scores, -float("inf"), pairs, terms.scoring, FEATURES)
    scale = 1.0 if FEATURES.MODIFIED else queries.late
    raised = tl.maximum(peak, tl.max(scores, axis=1) * scale)
    dtype: tl.constexpr = tl.float32 if FEATURES.MODIFIED else queries.q.dtype
    p = exp_of(scores, scale, raised[:, None], dtype)
    shrink = tl.exp(peak - raised)
    return p, shrink, raised, total * shrink + tl.sum(p, axis=1)


@triton.jit
def softmax_end(sums, peak, total, terms):
    """What the sums are divided to, and log(sum exp) with its rest."""
    total = tl.where(total == 0.0, 1.0, total)  # no key, or only scores of -inf: y is 0
    lse, low = split_lse(peak, total)
    return sums * (terms.dropout.factor / total)[:, None], lse, low


@triton.jit
def probabilities(products, extra, queries, known, pairs, terms, FEATURES: tl.constexpr):
    """P again, from lse; and the derivatives that modified() gives."""
    scores, outer, inner = modified(products, extra, queries.late, pairs, terms.scoring, FEATURES)
    if FEATURES.MODIFIED or queries.q.dtype == tl.float32:
        # They need no scale, and may be as large as a mask makes them.
        p = tl.exp((scores - known.lse) - known.low)
    else:
        p = exp_of(scores, queries.late, known.lse, queries.q.dtype)
    if queries.q.dtype == tl.float32 and known.total is not None:
        p = tl.div_rn(p, known.total)
    return shown(p, 0.0, pairs, terms.scoring, FEATURES), outer, inner


@triton.jit
def dscores(p, dp, known, outer, terms):
    """dS, by what is added to the scores."""
    ds = p * (dp - known.delta)
    if terms.scoring.derivative is not None:  # may be anything where P is 0
        ds = tl.where(p == 0.0, 0.0, ds * outer)
    return ds


@triton.jit
def dropped(x, queries, pairs, factor, terms, numbers):
    """x times `factor` but 0 where dropout strikes; x itself without dropout."""
    if terms.dropout.seed is not None:
        keep = keep_mask(queries.key0, queries.key1, pairs.j, numbers.threshold)
        x = tl.where(keep, x * factor, 0.0)
    return x


@triton.jit
def added(pairs, scoring, FEATURES: tl.constexpr):
    """What is added to the scores of `pairs`: bias, ALiBi, relative bias.

    It comes before the product: loads between two of Hopper's asynchronous products would make
    ptxas serialize them (C7515).
    """
    place = pairs.place
    total = 0.0
    if FEATURES.MODIFIED:
        if scoring.bias is not None:
            inside = (pairs.i < place.q_count) & (pairs.j < place.seen)
            total += load_plane(scoring.bias, pairs, inside).to(tl.float32)
        distance = pairs.j - (pairs.i + place.offset)
        if scoring.slopes is not None:
            at = place.sequence * scoring.slopes_sequence + pairs.head
            total -= tl.load(scoring.slopes + at) * tl.abs(distance).to(tl.float32)
        if scoring.table is not None:
            bucket = bucket_of(scoring.table, distance)
            value = tl.load(scoring.table.ptr + (pairs.head * scoring.table.count + bucket))
            total += value.to(tl.float32)
    return total


@triton.jit
def modified(products, extra, late, pairs, scoring, FEATURES: tl.constexpr):
    """(score, outer, inner): the score, its derivative by `extra`, which added() gave, and that of
    what `extra` is added to by the product, but for the scale. Unmodified, a score is a product."""
    s = products
    inner = 1.0
    outer = 1.0
    if FEATURES.MODIFIED:
        s = s * late
        if scoring.softcap is not None:
            u = s / scoring.softcap
            s = scoring.softcap * tanh(u)
            inner = slope_of_tanh(u)
        s += extra
        # A mask of -3e38 hides from other keys, but of nothing else every one is seen, as in torch.
        s = tl.where((s < LEAST) & (s > -float("inf")), LEAST, s)
        if scoring.score is not None:
            sequence = pairs.place.sequence
            if FEATURES.DERIVED and scoring.derivative is not None:
                outer = scoring.derivative(
                    s, sequence, pairs.head, pairs.i, pairs.j, scoring.tensors
                )
            s = scoring.score(s, sequence, pairs.head, pairs.i, pairs.j, scoring.tensors)
    return s, outer, inner


@triton.jit
def shown(scores, hidden, pairs, scoring, FEATURES: tl.constexpr):
    """`scores` with `hidden` where a query does not see a key: tiles that are no edge need nothing
    but a mask of their own."""
    if FEATURES.MASKED:
        visible = sees(pairs, scoring, FEATURES)
        # A user's function may give NaN for what is not there.
        visible = visible & (pairs.i < pairs.place.q_count)
        scores = tl.where(visible, scores, hidden)
    else:
        if pairs.edge:
            scores = tl.where(sees(pairs, scoring, FEATURES), scores, hidden)
    return scores


@triton.jit
def sees(pairs, scoring, FEATURES: tl.constexpr):
    """Which of its queries see which of its keys."""
    place = pairs.place
    i = pairs.i
    j = pairs.j
    visible = j < place.seen if FEATURES.KEYS_END else j >= 0
    if FEATURES.HAS_RIGHT:
        visible = visible & (j <= i + (place.offset + place.right))
    if FEATURES.HAS_LEFT:
        visible = visible & (j >= i + (place.offset - place.left))
    if scoring.mask is not None:
        inside = (i < place.q_count) & (j < place.seen)
        visible = visible & (load_plane(scoring.mask, pairs, inside) != 0)
    if scoring.bias is not None:  # what lies past its end is hidden
        visible = visible & (i < scoring.bias.queries) & (j < scoring.bias.keys)
    if scoring.mask_function is not None:
        visible = visible & scoring.mask_function(place.sequence, pairs.head, i, j, scoring.tensors)
    return visible


@triton.jit
def load_plane(plane, pairs, inside):
    """Its elements; 0 where not `inside` and past its ends."""
    inside = inside & (pairs.i < plane.queries) & (pairs.j < plane.keys)
    start = tl.cast(pairs.place.sequence, tl.int64) * plane.sequence
    start += tl.cast(pairs.head, tl.int64) * plane.head
    at = start + pairs.i.to(tl.int64) * plane.query + pairs.j.to(tl.int64) * plane.key
    return tl.load(plane.ptr + at, mask=inside, other=0)


@triton.jit
def bucket_of(table, distance):
    """The row of a relative bias for keys `distance` after their queries."""
    far = tl.minimum(tl.maximum(distance, -table.far), table.far)
    bucket = tl.load(table.buckets + (far + table.far))
    return tl.minimum(tl.maximum(bucket, 0), table.count - 1)  # on a GPU nobody has checked it


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
def exp_of(scores, late, shift, dtype: tl.constexpr):
    """exp(scores * late - shift)."""
    if dtype == tl.float32:
        p = tl.exp(scores * late - shift)
    else:  # one FMA and one exp2
        p = tl.exp2(tl.fma(scores, late * LOG2E, -shift * LOG2E))
    return p


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
def load_lse(statistics, queries):
    """lse and its rest, such that P is 0 for a query that sees nothing and for an absent one."""
    lse = tl.load(statistics.lse + queries.at, mask=queries.present, other=float("inf"))
    low = tl.load(statistics.low + queries.at, mask=queries.present, other=0.0)
    return tl.maximum(lse, LOWEST), low


@triton.jit
def load_known(statistics, queries, AXIS: tl.constexpr):
    lse, low = load_lse(statistics, queries)
    delta = tl.load(statistics.delta + queries.at, mask=queries.present, other=0.0)
    total = 1.0
    if statistics.total is not None:
        total = tl.load(statistics.total + queries.at, mask=queries.present, other=1.0)
        total = tl.expand_dims(total, AXIS)
    lse = tl.expand_dims(lse, AXIS)
    low = tl.expand_dims(low, AXIS)
    return Known(lse, low, tl.expand_dims(delta, AXIS), total)
