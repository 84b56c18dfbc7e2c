"""Attention's definition against sources that share no line with it, in float64.

torch's own attention, loops written from AttentionVariant's formulas, transformers' T5, and
FlexAttention in eager mode; its gradients against finite differences.
"""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_cases import cu_of
from attention_drawn import FUNCTIONS
from op_cases import with_seed

import slimkernels as sk
from slimkernels.ops._attention_variant import (
    AttentionVariant,
    RelativeBias,
    t5_relative_bias,
)
from slimkernels.testing import run_with_gradients

B, H, HKV, TQ, TK, D, DV = 2, 4, 2, 7, 9, 6, 5
# The longest chain of sums is that of a gradient: scores, their softmax, values, dp, its row's sum,
# and dk over the queries of two heads. Both sides round half an eps at each term of each.
TERMS = D + TK + TK + DV + TK + TQ * H // HKV
TIGHT = dict.fromkeys(("atol", "rtol"), 2 * TERMS * torch.finfo(torch.float64).eps)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs_of(B=B, H=H, Hkv=HKV, Tq=TQ, Tk=TK):
    shapes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, DV)
    return tuple(torch.randn(*shape, dtype=torch.float64) for shape in shapes)


def attend(q, k, v, *args, **options):
    options = {"enable_gqa": True, "backend": "torch", **options}
    return sk.scaled_dot_product_attention(q, k, v, *args, **options)


BROADCASTS = [
    *((TK,), (TQ, 1), (TQ, TK), (1, TQ, TK), (H, 1, TK), (H, TQ, 1), (B, 1, 1, TK)),
    *((B, H, TQ, TK), (1, 1, 1, 1), (B, 1, TQ, 1), ()),
]


@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_are_torchs(kind, shape):
    mask = torch.randn(shape, dtype=torch.float64)
    if kind == "bool":
        mask = mask > -0.3
    inputs = *inputs_of(), mask

    def torchs(q, k, v, m):
        m = m.expand(TQ, TK) if m.dim() < 2 else m  # it takes none of fewer dimensions
        return F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True)

    expected = run_with_gradients(torchs, inputs)
    actual = run_with_gradients(attend, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **TIGHT, msg=name)


def test_a_bias_field_is_a_floating_mask_and_stands_beside_a_bool_one():
    q, k, v = inputs_of()
    bias, mask = torch.randn(H, TQ, TK, dtype=torch.float64), torch.rand(B, 1, 1, TK) < 0.7
    variant = AttentionVariant(bias=bias)
    torch.testing.assert_close(attend(q, k, v, variant=variant), attend(q, k, v, bias), **TIGHT)
    both = bias.masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(
        attend(q, k, v, mask, variant=variant), attend(q, k, v, both), **TIGHT
    )


# Everything at once, by the formulas in AttentionVariant's docstring, one number after the other.

LENGTHS = torch.tensor([TK, 5], dtype=torch.int32)
SCORE_TENSORS = torch.randn(H), torch.tensor([3, 1], dtype=torch.int32)
VARIANTS = {
    "nothing": {},
    "window": {"window": (2, 3)},
    "left window": {"window": (1, None)},
    "right window": {"window": (None, 0)},
    "offset": {"causal_offset": 2, "window": (None, 0)},
    "offsets": {"causal_offset": torch.tensor([3, -2], dtype=torch.int32), "window": (4, 1)},
    "alibi": {"alibi_slopes": torch.rand(H), "causal_offset": 2},
    "alibi of each sequence": {"alibi_slopes": torch.rand(B, H)},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": torch.tensor([0.5, -torch.inf, 3.0, -1.0])},
    "relative": {
        "relative_bias": RelativeBias(
            torch.randn(3, H), torch.tensor([2, 0, 1, 1, 0], dtype=torch.int32)
        ),
        "causal_offset": 1,
    },
    "score": {"score": FUNCTIONS["leaky prefix"], "score_tensors": SCORE_TENSORS},
}
VARIANTS["everything"] = {k: v for fields in VARIANTS.values() for k, v in fields.items()}


def by_hand(q, k, v, mask, bias, lengths, is_causal, variant):
    """Output and lse by AttentionVariant's formulas, one score after the other."""
    y = torch.zeros(*q.shape[:3], DV, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(TQ)):
        offset = variant.causal_offset
        position = i + (offset if isinstance(offset, int) else int(offset[b]))
        key_head, scores = h // (H // HKV), {}
        for j in range(int(lengths[b])):
            if is_seen(b, i, position, j, is_causal, variant) and mask[b, 0, 0, j]:
                s = torch.dot(q[b, h, i], k[b, key_head, j]).item() / math.sqrt(D)
                scores[j] = modified(s, b, h, position - j, bias[h, i, j].item(), variant)
        total = sum(math.exp(s) for s in scores.values())
        if variant.sinks is not None:
            total += math.exp(variant.sinks[h])
        for j, s in scores.items():
            y[b, h, i] += math.exp(s) / total * v[b, key_head, j]
        lse[b, h, i] = math.log(total) if total else -math.inf
    return y, lse


def is_seen(b, i, position, j, is_causal, variant):
    left, right = variant.window or (None, None)
    right = 0 if is_causal else right
    seen = left is None or j >= position - left
    seen = seen and (right is None or j <= position + right)
    return seen and (variant.score is None or j <= i or j < int(variant.score_tensors[1][b]))


def modified(s, b, h, distance, bias, variant):
    """The score of a key `distance` before the query."""
    if variant.softcap is not None:
        s = variant.softcap * math.tanh(s / variant.softcap)
    s += bias
    if variant.alibi_slopes is not None:
        slopes = variant.alibi_slopes
        s -= float(slopes[h] if slopes.dim() == 1 else slopes[b, h]) * abs(distance)
    if variant.relative_bias is not None:
        table, buckets = variant.relative_bias
        m = len(buckets) // 2
        s += float(table[buckets[min(max(-distance, -m), m) + m], h])
    if variant.score is not None:
        s = (s if s > 0 else 0.25 * s) + float(variant.score_tensors[0][h])
    return s


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", VARIANTS)
def test_variants_are_their_formulas(case, is_causal):
    q, k, v = inputs_of()
    mask, bias = torch.rand(B, 1, 1, TK) < 0.8, torch.randn(H, TQ, TK, dtype=torch.float64)
    variant = AttentionVariant(**VARIANTS[case], bias=bias)
    options = {"is_causal": is_causal, "key_lengths": LENGTHS, "variant": variant}
    actual = attend(q, k, v, mask, **options, return_lse=True)
    expected = by_hand(q, k, v, mask, bias, LENGTHS, is_causal, variant)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (32, 20), (8, 9), (64, 1000), (6, 5)])
def test_t5_buckets_are_t5s(buckets, max_distance, bidirectional):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    table = torch.zeros(buckets, H)
    relative = t5_relative_bias(table, bidirectional=bidirectional, max_distance=max_distance)
    m = len(relative.buckets) // 2
    distances = torch.arange(-3 * m, 3 * m + 1)
    expected = modeling.T5Attention._relative_position_bucket(
        distances, bidirectional, buckets, max_distance
    )
    assert torch.equal(relative.buckets[distances.clamp(-m, m) + m].long(), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_attention_is_the_same_function():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    q, k, v = (t.float() for t in inputs_of())
    slopes, bias = torch.rand(H), torch.randn(H, TQ, TK)
    leaky = FUNCTIONS["leaky prefix"]

    def score_mod(score, b, h, i, j):
        score = 3.0 * torch.tanh(score / 3.0) + bias[h, i, j] - slopes[h] * (i + 2 - j).abs()
        return leaky.torch_score(score, b, h, i, j, SCORE_TENSORS)

    def mask_mod(b, h, i, j):
        window = (j >= i + 2 - 3) & (j <= i + 2 + 1)
        return window & leaky.torch_mask(b, h, i, j, SCORE_TENSORS) & (j < LENGTHS[b])

    block_mask = flex.create_block_mask(mask_mod, B, H, TQ, TK, device="cpu")
    variant = AttentionVariant(
        **{"bias": bias, "window": (3, 1), "causal_offset": 2, "alibi_slopes": slopes},
        **{"softcap": 3.0, "score": leaky, "score_tensors": SCORE_TENSORS},
    )
    theirs = flex.flex_attention(q, k, v, score_mod, block_mask, enable_gqa=True)
    ours = attend(q, k, v, key_lengths=LENGTHS, variant=variant)
    torch.testing.assert_close(ours, theirs, **TIGHT)


def test_lse_is_logsumexp_of_the_scores():
    q, k, v = inputs_of()
    _, lse = attend(q, k, v, is_causal=True, scale=-0.4, return_lse=True)
    scores = -0.4 * q @ k.repeat_interleave(H // HKV, 1).mT
    scores = scores.masked_fill(torch.ones(TQ, TK).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), **TIGHT)
    assert lse.dtype == torch.float64


# One function and one variant of everything that has a gradient, for finite differences: no kinks.
SMOOTH = FUNCTIONS["tilted"]


@pytest.mark.parametrize("ragged", [False, True])
def test_gradients_are_finite_differences(ragged):
    heads, lengths, Tk = 2, ([3, 1], [4, 3]), 4
    cu_seqlens = tuple(cu_of(n, "cpu") for n in lengths)
    q, k, v = (torch.randn(2, heads, T, 3, dtype=torch.float64) for T in (3, Tk, Tk))
    if ragged:
        q, k, v = (torch.randn(sum(n), heads, 3).double() for n in (*lengths, lengths[1]))
    parameters = torch.randn(1, heads, 1, Tk), torch.randn(heads), torch.randn(8, heads)
    leaves = [t.double().requires_grad_() for t in (q, k, v, *parameters)]
    mask = torch.tensor([[True, True, False, True]])

    @with_seed
    def everything(q, k, v, bias, sinks, table):
        variant = AttentionVariant(
            bias=bias,
            window=(3, 2),
            causal_offset=torch.tensor([1, 0], dtype=torch.int32),
            alibi_slopes=torch.tensor([0.3, 0.1]),
            softcap=2.0,
            sinks=sinks,
            relative_bias=t5_relative_bias(table, max_distance=3),
            score=SMOOTH,
        )
        options = {"cu_seqlens": cu_seqlens} if ragged else {"key_lengths": LENGTHS - 5}
        return attend(
            *(q, k, v, mask, 0.3), **options, scale=-0.7, variant=variant, return_lse=True
        )

    assert torch.autograd.gradcheck(everything, leaves)


def test_padded_and_ragged_agree_with_everything_on():
    lengths_q, lengths_k = [3, 7, 0, 1], [9, 2, 4, 5]
    sequences, rows = len(lengths_q), [(b, i) for b in range(4) for i in range(lengths_q[b])]
    q, k, v = inputs_of(B=sequences)
    bias, sinks, table = (torch.randn(*n).double() for n in ((4, H, TQ, TK), (H,), (8, H)))
    mask, slopes = torch.rand(sequences, 1, TQ, TK) < 0.8, torch.rand(sequences, H)
    offsets = torch.tensor([6, -5, 4, 4], dtype=torch.int32)

    def variant_of(bias, sinks, table):
        return AttentionVariant(
            **{"bias": bias, "window": (4, 3), "causal_offset": offsets, "softcap": 2.0},
            **{"alibi_slopes": slopes, "sinks": sinks, "score": FUNCTIONS["tilted"]},
            relative_bias=t5_relative_bias(table, max_distance=4),
        )

    def padded(q, k, v, *parameters):
        options = {"key_lengths": torch.tensor(lengths_k, dtype=torch.int32)}
        y, lse = attend(q, k, v, mask, **options, variant=variant_of(*parameters), return_lse=True)
        b, i = (torch.tensor(n) for n in zip(*rows, strict=True))
        return y[b, :, i], lse[b, :, i].mT

    def ragged(q, k, v, *parameters):
        q, k, v = (
            torch.cat([t[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])
            for t, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k))
        )
        options = {"cu_seqlens": tuple(cu_of(n, "cpu") for n in (lengths_q, lengths_k))}
        return attend(q, k, v, mask, **options, variant=variant_of(*parameters), return_lse=True)

    inputs = q, k, v, bias, sinks, table
    expected, actual = (run_with_gradients(f, inputs) for f in (padded, ragged))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **TIGHT, msg=name)


def test_one_graph_for_all_lengths_with_everything_on():
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    table, buckets = t5_relative_bias(torch.randn(8, H), max_distance=6)

    def everything(q, k, v, bias, sinks, table, mask, offsets, slopes):
        variant = AttentionVariant(
            **{"bias": bias, "window": (5, 3), "causal_offset": offsets, "softcap": 2.0},
            **{"alibi_slopes": slopes, "sinks": sinks, "score": FUNCTIONS["leaky prefix"]},
            **{"score_tensors": SCORE_TENSORS, "relative_bias": RelativeBias(table, buckets)},
        )
        return attend(q, k, v, mask, 0.2, variant=variant, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=graphs)
    for Tq, Tk in ((5, 8), (6, 9), (11, 7), (23, 40)):
        q, k, v = (t.float() for t in inputs_of(Tq=Tq, Tk=Tk))
        parameters = torch.randn(H, Tq, Tk), torch.randn(H), torch.randn(8, H)
        others = torch.rand(B, 1, 1, Tk) < 0.8, torch.tensor([2, 1]).int()
        slopes = torch.rand(B, H)

        def calls(*leaves, f, others=others, slopes=slopes):
            torch.manual_seed(7)
            return f(*leaves, *others, slopes)

        leaves = q, k, v, *parameters
        expected, actual = (
            run_with_gradients(lambda *t, f=f: calls(*t, f=f), leaves)
            for f in (everything, compiled)
        )
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, **TIGHT, msg=name)
    assert graphs.frame_count <= 2  # the first, and one for any lengths
