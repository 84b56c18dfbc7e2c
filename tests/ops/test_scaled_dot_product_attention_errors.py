"""What attention's masks and variants must not be: one sentence each, the same on every backend.

The other arguments' sentences are in test_scaled_dot_product_attention_edges.py.
"""

import re

import pytest
import torch
from attention_cases import NAME
from attention_drawn import FUNCTIONS
from op_cases import KERNEL_BACKENDS, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops import _attention_arguments
from slimkernels.ops._attention_variant import (
    AttentionVariant,
    RelativeBias,
    ScoreFunction,
    t5_relative_bias,
)

Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)  # (B, H, Tq, D), (B, Hkv, Tk, D)
TOKENS = torch.randn(6, 2, 8)
TILTED = FUNCTIONS["tilted"]


def zeros(*shape, dtype=torch.float32, device="cpu", requires_grad=False):
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=requires_grad)


def ints(*values, dtype=torch.int32, device="cpu"):
    return torch.tensor(values, dtype=dtype, device=device)


SEQUENCES = {"cu_seqlens": ints(0, 2, 6)}
HALF, META = {"dtype": torch.float16}, {"device": "meta"}

ARGUMENTS = [
    ({"attn_mask": [1.0]}, "attn_mask must be a tensor; got list"),
    ({"attn_mask": ints(1)}, "attn_mask must be bool, True where .*, or floating; got torch.int32"),
    ({"attn_mask": zeros(5, 7, **HALF)}, "attn_mask must be torch.float32 like query; got"),
    ({"attn_mask": zeros(5, 7, **META)}, "attn_mask must be on cpu like query; got meta"),
    ({"attn_mask": zeros(5, 7, **META) > 0}, "attn_mask must be on cpu like query; got meta"),
    (
        {"attn_mask": zeros(5, 6)},
        r"attn_mask must broadcast to \(B, H, Tq, Tk\) = \(2, 4, 5, 7\); got \(5, 6\)",
    ),
    ({"attn_mask": zeros(3, 1, 1, 1) > 0}, r"attn_mask must broadcast .*; got \(3, 1, 1, 1\)"),
    ({"attn_mask": zeros(2, 2, 5, 7)}, r"attn_mask must broadcast .*; got \(2, 2, 5, 7\)"),
    ({"attn_mask": zeros(1, 1, 1, 5, 7)}, r"attn_mask must be \(B, .*; got \(1, 1, 1, 5, 7\)"),
    ({"is_causal": None}, "is_causal must be True or False; got None"),
    ({"is_causal": zeros(2)}, "is_causal must be True or False; got Tensor"),
    ({"enable_gqa": "yes"}, "enable_gqa must be True or False; got 'yes'"),
    ({"enable_gqa": False}, "enable_gqa must be True for 4 heads of query on 2 of key; got False"),
    ({"scale": "small"}, "scale must be a number; got 'small'"),
    ({"scale": float("nan")}, "scale must be finite in float32; got nan"),
    ({"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\); got -0.1"),
    ({"key_lengths": ints(3, 3, **META)}, "key_lengths must be on cpu like query; got meta"),
    ({"variant": {}}, "variant must be an AttentionVariant; got dict"),
    ({"variant": AttentionVariant}, "variant must be an AttentionVariant; got type"),
    (
        {"attn_mask": zeros(5, 7), "variant": AttentionVariant(bias=zeros(5, 7))},
        "variant.bias must be None with a floating attn_mask, which is one",
    ),
]

VARIANTS = [
    ({"bias": 1.0}, "bias must be a tensor; got float"),
    ({"bias": zeros(5, 7) > 0}, "bias must be torch.float32 like query; got torch.bool"),
    ({"bias": zeros(5, 7, dtype=torch.float64)}, "bias must be torch.float32 .*; got torch.fl"),
    ({"bias": zeros(5, 7, **META)}, "bias must be on cpu like query; got meta"),
    ({"bias": zeros(2, 1, 7)}, r"bias must broadcast to .*; got \(2, 1, 7\)"),
    ({"window": 3}, r"window must be \(left, right\); got 3"),
    ({"window": (3,)}, r"window must be \(left, right\); got \(3,\)"),
    ({"window": (3, -1)}, r"window must be .* from 0 to 2\^29 or None .*; got \(3, -1\)"),
    ({"window": (1.5, None)}, r"window must be .* an integer .*; got \(1.5, None\)"),
    ({"window": (True, 0)}, r"window must be .* an integer .*; got \(True, 0\)"),
    ({"window": (2**70, 0)}, r"window must be .* 2\^29 .*"),
    ({"causal_offset": 1.5}, "causal_offset must be an integer; got 1.5"),
    ({"causal_offset": None}, "causal_offset must be an integer; got None"),
    ({"causal_offset": [1, 2]}, r"causal_offset must be an integer; got \[1, 2\]"),
    ({"causal_offset": 2**30}, r"causal_offset must be at most 2\^29 in size; got 1073741824"),
    ({"causal_offset": -(2**70)}, r"causal_offset must be at most 2\^29 in size; got -118"),
    ({"causal_offset": ints(1)}, r"causal_offset must have shape \(2,\), one a sequence; got"),
    ({"causal_offset": torch.tensor(1).int()}, r"causal_offset must have shape \(2,\), .*\(\)"),
    ({"causal_offset": ints(1, 2).long()}, "causal_offset must be int32; got torch.int64"),
    ({"causal_offset": ints(1, 2, **META)}, "causal_offset must be on cpu like query; got meta"),
    ({"alibi_slopes": [1.0]}, "alibi_slopes must be a tensor; got list"),
    ({"alibi_slopes": zeros(4, **HALF)}, "alibi_slopes must be float32; got torch.float16"),
    ({"alibi_slopes": zeros(3)}, r"alibi_slopes must be \(4,\) or \(2, 4\); got \(3,\)"),
    ({"alibi_slopes": zeros(1, 4)}, r"alibi_slopes must be \(4,\) or \(2, 4\); got \(1, 4\)"),
    ({"alibi_slopes": zeros(4, **META)}, "alibi_slopes must be on cpu like query; got meta"),
    ({"alibi_slopes": zeros(4, requires_grad=True)}, "alibi_slopes must not require a gradient"),
    ({"softcap": 0}, "softcap must be above 0, or None; got 0"),
    ({"softcap": -1.0}, "softcap must be above 0, or None; got -1.0"),
    ({"softcap": 1e-46}, "softcap must be at least 1e-30, or None; got 1e-46"),
    ({"softcap": float("nan")}, "softcap must be finite in float32; got nan"),
    ({"softcap": float("inf")}, "softcap must be finite in float32; got inf"),
    ({"softcap": "5"}, "softcap must be a number; got '5'"),
    ({"softcap": True}, "softcap must be a number; got True"),
    ({"sinks": [0.0]}, "sinks must be a tensor; got list"),
    ({"sinks": zeros(2)}, r"sinks must be \(4,\), one a head; got \(2,\)"),
    ({"sinks": zeros(1, 4)}, r"sinks must be \(4,\), one a head; got \(1, 4\)"),
    ({"sinks": zeros(4, **HALF)}, "sinks must be torch.float32 like query; got torch.float16"),
    ({"sinks": zeros(4, **META)}, "sinks must be on cpu like query; got meta"),
    ({"relative_bias": zeros(3, 4)}, "relative_bias must be a RelativeBias; got Tensor"),
    ({"relative_bias": (zeros(3, 4), ints(0))}, "relative_bias must be a RelativeBias; got tuple"),
    ({"score": print}, "score must be a ScoreFunction; got builtin_function_or_method"),
    ({"score_tensors": (Q,)}, "score_tensors must be empty without score"),
    ({"score_tensors": None}, "score_tensors must be a tuple of tensors; got NoneType"),
    ({"score": TILTED, "score_tensors": Q}, "score_tensors must be a tuple of tensors; got Tensor"),
    ({"score": TILTED, "score_tensors": (1,)}, "score_tensors must be .*; got int in it"),
    (
        {"score": TILTED, "score_tensors": (zeros(1, requires_grad=True),)},
        "score_tensors must not require a gradient: they get none",
    ),
    (
        {"score": TILTED, "score_tensors": (zeros(1, **META),)},
        "score_tensors must be on cpu like query; got meta",
    ),
    ({"float32_precision": "bf16"}, "float32_precision must be 'ieee' or 'tf32'; got 'bf16'"),
    ({"float32_precision": None}, "float32_precision must be 'ieee' or 'tf32'; got None"),
    ({"batch_invariant": None}, "batch_invariant must be True or False; got None"),
]

RELATIVE = [
    ({"table": [0.0]}, "table must be a tensor; got list"),
    ({"table": zeros(4)}, r"table must be \(buckets, 4\); got \(4,\)"),
    ({"table": zeros(4, 2)}, r"table must be \(buckets, 4\); got \(4, 2\)"),
    ({"table": zeros(0, 4)}, r"table must be \(buckets, 4\); got \(0, 4\)"),
    ({"table": zeros(4, 4, **HALF)}, "table must be torch.float32 like query; got torch.float16"),
    ({"table": zeros(4, 4, **META)}, "table must be on cpu like query; got meta"),
    ({"buckets": [0]}, "buckets must be a tensor; got list"),
    ({"buckets": ints(0).long()}, "buckets must be int32; got torch.int64"),
    ({"buckets": ints(0, **META)}, "buckets must be on cpu like query; got meta"),
    ({"buckets": ints(0)[None]}, r"buckets must have shape \(2 \* m \+ 1,\); got \(1, 1\)"),
    ({"buckets": ints(0, 1)}, r"buckets must have shape \(2 \* m \+ 1,\); got \(2,\)"),
    ({"buckets": ints()}, r"buckets must have shape \(2 \* m \+ 1,\); got \(0,\)"),
    ({"buckets": ints(0, 3, 4)}, "buckets must be rows of table, from 0 to 3; got 0 to 4"),
    ({"buckets": ints(0, -1, 3)}, "buckets must be rows of table, from 0 to 3; got -1 to 3"),
]

RAGGED = [
    (
        {"attn_mask": zeros(3, 1, 4, 4) > 0},
        r"attn_mask .* = \(2, 2, any, any\); got \(3, 1, 4, 4\)",
    ),
    ({"variant": {"bias": zeros(3, 1, 4, 4)}}, r"variant.bias must .* \(2, 2, any, any\); got \(3"),
    ({"variant": {"bias": zeros(2, 4, 4, 4)}}, r"variant.bias must .*; got \(2, 4, 4, 4\)"),
    ({"variant": {"causal_offset": ints(1)}}, r"variant.causal_offset must have shape \(2,\)"),
    (
        {"variant": {"alibi_slopes": zeros(6, 2)}},
        r"variant.alibi_slopes must be \(2,\) or \(2, 2\)",
    ),
    ({"cu_seqlens": 3}, "cu_seqlens must be a tensor; got int"),
    (
        {"cu_seqlens": (ints(0, 6), None)},
        "cu_seqlens must be a tensor or a pair .* got tuple of Tensor, NoneType",
    ),
    ({"cu_seqlens": ints(0, 6, **META)}, "cu_seqlens must be on cpu like query; got meta"),
]


def assert_refused(inputs, options, sentence, backend):
    with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
        sk.scaled_dot_product_attention(*inputs, **options, backend=backend)


@pytest.mark.parametrize("options, sentence", ARGUMENTS)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_argument_is_one_sentence(backend, options, sentence):
    assert_refused((Q, K, K), {"enable_gqa": True, **options}, sentence, backend)


@pytest.mark.parametrize("fields, sentence", VARIANTS)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_field_of_a_variant_is_one_sentence(backend, fields, sentence):
    options = {"enable_gqa": True, "variant": AttentionVariant(**fields)}
    assert_refused((Q, K, K), options, f"variant.{sentence}", backend)


@pytest.mark.parametrize("fields, sentence", RELATIVE)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_relative_bias_is_one_sentence(backend, fields, sentence):
    relative = RelativeBias(**{"table": zeros(4, 4), "buckets": ints(0, 1, 2), **fields})
    options = {"enable_gqa": True, "variant": AttentionVariant(relative_bias=relative)}
    assert_refused((Q, K, K), options, f"variant.relative_bias.{sentence}", backend)


@pytest.mark.parametrize("options, sentence", RAGGED)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_argument_of_ragged_sequences_is_one_sentence(backend, options, sentence):
    options = {**SEQUENCES, **options}
    if "variant" in options:
        options["variant"] = AttentionVariant(**options["variant"])
    assert_refused((TOKENS,) * 3, options, sentence, backend)


def attend(backend, given):
    """A call of which nothing is wrong but, perhaps, the integers."""
    given = dict(given)
    variant = AttentionVariant(causal_offset=given.pop("offsets", 0))
    if "buckets" in given:
        relative = RelativeBias(zeros(4, 4), given.pop("buckets"))
        variant = variant._replace(relative_bias=relative)
    inputs = (TOKENS,) * 3 if "cu_seqlens" in given else (Q, K, K)
    options = {"enable_gqa": True, "variant": variant, **given}
    if not torch.compiler.is_compiling():
        skip_unsupported(NAME, backend, *inputs, **options)
    return sk.scaled_dot_product_attention(*inputs, **options, backend=backend)


# Right values, which the graph is made with, wrong ones, and the sentence.
TRACED = {
    "cu_seqlens": [
        (ints(0, 2, 6), ints(0, 2, 5), "cu_seqlens of query must go from 0 to its 6 .* 0 to 5"),
        (ints(0, 2, 6), ints(1, 2, 6), "cu_seqlens of query must go from 0 to its 6 .* 1 to 6"),
        (ints(0, 2, 4, 6), ints(0, 4, 2, 6), "cu_seqlens of query must not fall"),
    ],
    "key_lengths": [(ints(7, 3), ints(8, 3), "key_lengths must be from 0 to the 7 keys; got 3 to")],
    "offsets": [(ints(1, 2), ints(1, 2**30), "variant.causal_offset must be at most 2.29 in size")],
    "buckets": [(ints(0, 1, 3), ints(0, 1, 4), "variant.relative_bias.buckets must be rows of ta")],
}


@pytest.mark.parametrize(
    "name, right, wrong, sentence", [(n, *case) for n, cases in TRACED.items() for case in cases]
)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_compiled_call_looks_at_integers_when_it_runs(backend, name, right, wrong, sentence):
    if device_of(backend).type != "cpu":
        pytest.skip("on a GPU the host would wait for them")
    attend(backend, {name: right})  # skips where there is no kernel
    run = maybe_compiled(lambda values: attend(backend, {name: values}), True)
    assert run(right).isfinite().all()
    with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
        run(wrong)


@pytest.mark.parametrize("value", [K[:1], K[:, :1], K[:, :, :3]], ids=["batch", "heads", "length"])
def test_value_must_be_keys_shape_but_for_the_width(value):
    got = tuple(value.shape)
    sentence = f"value must have key's shape (2, 2, 7, 8) but for the width; got {got}"
    assert_refused((Q, K, value), {"enable_gqa": True}, re.escape(sentence), None)


KERNEL = TILTED.score


@pytest.mark.parametrize(
    "functions, sentence",
    [
        ({}, "score or mask must be given"),
        ({"score": KERNEL}, "torch_score is missing: score needs both forms"),
        ({"torch_score": print}, "score is missing: score needs both forms"),
        ({"mask": KERNEL}, "torch_mask is missing: mask needs both forms"),
        ({"torch_mask": print}, "mask is missing: mask needs both forms"),
        (
            {"mask": KERNEL, "torch_mask": print, "derivative": KERNEL},
            "derivative must be None without score",
        ),
        (
            {"score": print, "torch_score": print},
            "score must be a @triton.jit function; got print",
        ),
        (
            {"score": KERNEL, "torch_score": print, "derivative": 1.0},
            "derivative must be a @triton.jit function; got float",
        ),
        ({"mask": KERNEL, "torch_mask": 1}, "torch_mask must be a function; got int"),
    ],
)
def test_bad_score_function_is_one_sentence(functions, sentence):
    with pytest.raises(ValueError, match=f"^ScoreFunction: {re.escape(sentence)}"):
        ScoreFunction(**functions)


@pytest.mark.parametrize(
    "table, options, sentence",
    [
        (3, {}, r"table must be \(buckets, H\); got int"),
        (zeros(3), {}, r"table must be \(buckets, H\); got \(3,\)"),
        (zeros(3, 2), {}, "table must have 4 buckets or more; got 3"),
        (zeros(1, 2), {"bidirectional": False}, "table must have 2 buckets or more; got 1"),
        (zeros(32, 2), {"max_distance": 8}, "max_distance must be above the 8 exact buckets .* 8"),
        (zeros(32, 2), {"max_distance": 9.5}, "max_distance must be an integer; got 9.5"),
        (zeros(32, 2), {"bidirectional": "no"}, "bidirectional must be True or False; got 'no'"),
    ],
)
def test_bad_t5_bias_is_one_sentence(table, options, sentence):
    with pytest.raises(ValueError, match=f"^t5_relative_bias: {sentence}"):
        t5_relative_bias(table, **options)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_remembered_call_answers_for_no_other():
    """What equals it in shapes, or as a key of a dict, and yet is another call."""
    q, k = Q.clone(), K.clone()
    options = {"scale": 1.0, "is_causal": True, "enable_gqa": True}
    for _ in range(2):
        first = OPS[NAME].arguments(q, k, k, **options)[-1]
        assert (first.scale, first.right, first.key_lengths) == (1.0, 0, None)
        lengths = ints(3, 7)
        assert (
            OPS[NAME].arguments(q, k, k, **options, key_lengths=lengths)[-1].key_lengths is lengths
        )
        assert OPS[NAME].arguments(q, k, k, **options | {"is_causal": False})[-1].right == -1
        assert OPS[NAME].arguments(q, k, k, **options | {"scale": 2.0})[-1].scale == 2.0
        for wrong in ({"is_causal": 1}, {"enable_gqa": 1}, {"scale": True}, {"dropout_p": False}):
            (name,) = wrong
            with pytest.raises(ValueError, match=f"^{NAME}: {name} must be"):
                sk.scaled_dot_product_attention(q, k, k, **options | wrong)
        with pytest.raises(ValueError, match=f"^{NAME}: "):
            sk.scaled_dot_product_attention(q, k, k, **options, cu_seqlens=(None, None))
        for other in (k.to_sparse(), k.double(), k.to("meta"), torch.nested.nested_tensor([k[0]])):
            with pytest.raises(ValueError, match=f"^{NAME}: key must "):
                sk.scaled_dot_product_attention(q, other, k, **options)


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")
def test_what_is_traced_is_not_remembered():
    def scale_of(q):
        return OPS[NAME].arguments(q, q, q)[-1].scale

    _attention_arguments._known_calls.clear()
    torch.jit.trace(lambda q: (scale_of(q), q + 1)[1], Q, check_trace=False)  # sizes are tensors
    assert len(_attention_arguments._known_calls) == 0
    for _ in range(2):
        assert type(scale_of(Q)) is float


def test_few_calls_are_remembered():
    pytest.importorskip("slimkernels._cpu", reason="nothing is kept without the extension")
    known, most = _attention_arguments._known_calls, _attention_arguments._MOST_KNOWN
    for n in range(most + 10):
        call = OPS[NAME].arguments(Q, Q, Q, scale=1.0 + n)[-1]
        assert OPS[NAME].arguments(Q, Q, Q, scale=1.0 + n)[-1] is call
        assert len(known) <= most


@pytest.mark.parametrize("leaf", ["query", "key", "bias", "table", "value", None])
def test_without_its_derivative_a_score_function_gives_no_wrong_gradient(leaf):
    device = device_of("triton")
    q, k, v = (torch.randn(1, 2, 5, 16, device=device) for _ in range(3))
    table, bias = torch.randn(4, 2, device=device), torch.randn(5, 5, device=device)
    leaves = {"query": q, "key": k, "bias": bias, "table": table, "value": v}
    if leaf is not None:
        leaves[leaf].requires_grad_()
    function = ScoreFunction(score=TILTED.score, torch_score=TILTED.torch_score)
    relative = RelativeBias(table, ints(0, 1, 2, device=device))
    variant = AttentionVariant(score=function, relative_bias=relative, bias=bias)
    refusal = OPS[NAME].unsupported("triton", *OPS[NAME].arguments(q, k, v, variant=variant))
    if leaf in (None, "value"):
        assert refusal is None
        return
    assert refusal == "the score function has no derivative, which this call's gradients need"
    with torch.no_grad():
        assert sk.scaled_dot_product_attention(q, k, v, variant=variant, backend="triton").any()
    assert OPS[NAME].select(*OPS[NAME].arguments(q, k, v, variant=variant)) == "torch"
