"""Attention with a fault: the definition, broken in one of the ways that kernels get broken.

What the drawn calls must catch: test_scaled_dot_product_attention_teeth.py.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch
from attention_yardstick import Function, canonical

from slimkernels.ops import _attention_reference as reference
from slimkernels.ops._attention_reference import scaled_dot_product_attention_reference

FAULTS: dict[str, Function] = {}


def fault(function: Callable) -> Callable:
    """Registers a function (case, query, key, value, call) -> (output, lse)."""

    def attend(case, leaves, options):
        inputs, call = canonical(case, leaves, options)
        return function(case, *inputs, call)

    FAULTS[function.__name__] = attend
    return function


def changed(name: str, change: Callable) -> None:
    """A fault that is another call: `change` gives the fields that differ, if it has any."""

    def attend(case, q, k, v, call):
        return right(q, k, v, call._replace(**change(call)))

    attend.__name__ = name
    fault(attend)


right = scaled_dot_product_attention_reference
true_modified, true_visible = reference._modified, reference._visible

changed("mask_dropped", lambda c: {"mask": None})
changed("window_left_off_by_one", lambda c: {"left": c.left + (c.left >= 0)})
changed("window_right_off_by_one", lambda c: {"right": c.right + (c.right > 0)})
changed("offset_ignored", lambda c: {"causal_offset": 0, "causal_offsets": None})
changed("scale_without_sign", lambda c: {"scale": abs(c.scale)})
changed("sinks_without_gradient", lambda c: {"sinks": _detached(c.sinks)})
changed("table_without_gradient", lambda c: {"table": _detached(c.table)})
changed("length_off_by_one", lambda c: {"key_lengths": _more(c.key_lengths)})
changed("slopes_of_the_first_sequence", lambda c: {"alibi_slopes": _first(c.alibi_slopes, 0)})
changed("offset_of_the_first_sequence", lambda c: {"causal_offsets": _first(c.causal_offsets, 0)})
changed("bias_of_the_first_head", lambda c: {"bias": _first(c.bias, 1)})
changed("mask_of_the_first_batch", lambda c: {"mask": _first(c.mask, 0)})
changed("far_keys_in_the_middle_bucket", lambda c: {"buckets": _without_far(c.buckets)})
changed("bias_gradient_of_one_row", lambda c: {"bias": _one_row(c.bias, -2)})
changed("bias_gradient_of_one_head", lambda c: {"bias": _one_row(c.bias, 1)})


def _detached(t):
    return None if t is None else t.detach()


def _more(lengths):
    return None if lengths is None else lengths + 1


def _first(t, dim):
    return t if t is None or not t.numel() else t.narrow(dim, 0, 1).expand_as(t)


def _without_far(buckets):
    if buckets is None:
        return None
    return torch.cat((buckets[len(buckets) // 2].view(1), buckets[1:]))


def _one_row(bias, dim):
    """A gradient that forgets to sum over a dimension of one."""
    if bias is None or bias.shape[dim] != 1:
        return bias
    return 0.5 * bias + 0.5 * bias.detach()


@fault
def sinks_not_in_lse(case, q, k, v, call):
    return right(q, k, v, call)[0], right(q, k, v, call._replace(sinks=None))[1]


@fault
def lse_without_gradient(case, q, k, v, call):
    y, lse = right(q, k, v, call)
    return y, lse.detach() + 0 * y.sum()


@fault
def lse_in_bfloat16(case, q, k, v, call):
    y, lse = right(q, k, v, call)
    return y, lse.bfloat16().float()


@fault
def output_in_bfloat16(case, q, k, v, call):
    y, lse = right(q, k, v, call)
    return y.bfloat16().to(y.dtype), lse


@fault
def products_of_tensor_cores(case, q, k, v, call):
    """float32 with the 10 bits of mantissa of TF32, of which float16 has as many."""
    if q.dtype == torch.float32:
        q, k = (q.half().float(), k.half().float())
    return right(q, k, v, call)


@fault
def lowest_instead_of_minus_infinity(case, q, k, v, call):
    y, lse = right(q, k, v, call)
    return y, lse.clamp(min=-1e30)


@fault
def dropout_not_rescaled(case, q, k, v, call):
    y, lse = right(q, k, v, call)
    return y * (1 - call.dropout_p), lse


@fault
def aligned_bottom_right(case, q, k, v, call):
    if case.ragged or call.right < 0:
        return right(q, k, v, call)
    return right(q, k, v, call._replace(causal_offset=call.causal_offset + k.shape[2] - q.shape[2]))


@fault
def heads_interleaved(case, q, k, v, call):
    """Query head h reads key head h % Hkv; heads are the second dimension, dense and ragged."""
    k, v = (t.repeat(1, case.heads[1], *(1,) * (t.dim() - 2)) for t in (k, v))
    return right(q, k, v, call)


@fault
def last_key_of_many_missed(case, q, k, v, call):
    def visible(pairs, call):
        j = pairs.j
        return true_visible(pairs, call) & ((j < 16) | (j < j.max() if j.numel() else True))

    with patch.object(reference, "_visible", visible):
        return right(q, k, v, call)


@fault
def bias_past_its_end_not_hidden(case, q, k, v, call):
    with patch.object(reference, "_within", lambda x, pairs: pairs.i >= 0):
        return right(q, k, v, call)


@fault
def positions_of_the_whole_batch(case, q, k, v, call):
    """Of ragged sequences: all counted from the first token."""

    def modified(scores, pairs, call):
        if not call.ragged:
            return true_modified(scores, pairs, call)
        i, j = (torch.arange(n) for n in scores.shape[-2:])
        return true_modified(scores, pairs._replace(i=i[:, None], j=j), call)

    with patch.object(reference, "_modified", modified):
        return right(q, k, v, call)


def _modified_fault(name, modified):
    def attend(case, q, k, v, call):
        with patch.object(reference, "_modified", modified):
            return right(q, k, v, call)

    attend.__name__ = name
    fault(attend)


def _without_derivative(before, after):
    return before + (after - before).detach().nan_to_num(neginf=0.0)


def _softcap_without_derivative(scores, pairs, call):
    capped = true_modified(scores, pairs, _only(call, softcap=call.softcap))
    scores = _without_derivative(scores, capped)
    return true_modified(scores, pairs, call._replace(softcap=0.0))


def _score_without_derivative(scores, pairs, call):
    plain = true_modified(scores, pairs, call._replace(function=None))
    after = true_modified(plain, pairs, _only(call, function=call.function))
    return plain + (after - plain).detach().nan_to_num()


def _softcap_last(scores, pairs, call):
    scores = true_modified(scores, pairs, call._replace(softcap=0.0, function=None))
    return true_modified(scores, pairs, _only(call, softcap=call.softcap, function=call.function))


def _only(call, **fields):
    none = {"bias": None, "alibi_slopes": None, "table": None, "softcap": 0.0, "function": None}
    return call._replace(**{**none, **fields})


def _unshifted(scores, pairs, call):
    return true_modified(scores, pairs._replace(offset=0), call)


def _later_keys_gain(scores, pairs, call):
    if call.alibi_slopes is None:
        return true_modified(scores, pairs, call)
    distance = pairs.j - (pairs.i + pairs.offset)
    of = pairs.sequence.clamp(0, len(call.alibi_slopes) - 1)
    slopes = call.alibi_slopes.to(scores.dtype)[of, pairs.head]
    scores = true_modified(scores, pairs, call)
    return scores + slopes * (distance.abs() + distance)


_modified_fault("softcap_without_derivative", _softcap_without_derivative)
_modified_fault("score_without_derivative", _score_without_derivative)
_modified_fault("softcap_last", _softcap_last)
_modified_fault("offset_ignored_in_distances", _unshifted)
_modified_fault("alibi_without_absolute_value", _later_keys_gain)
