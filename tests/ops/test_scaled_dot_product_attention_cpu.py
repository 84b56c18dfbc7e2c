"""What only the CPU kernels of attention do: split keys, skipped blocks, sums without atomics."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from attention_cases import NAME, call_of, cu_of
from op_cases import with_seed

import slimkernels as sk
from slimkernels.ops._attention_reference import scaled_dot_product_attention_reference
from slimkernels.ops._attention_variant import AttentionVariant, RelativeBias, ScoreFunction
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

FLOATS = [torch.float32, torch.bfloat16]
PARAMETERS = "bias", "sinks", "table"


def _isas_available():
    try:
        from slimkernels import _cpu
    except ImportError:
        return []
    return _cpu.isas_available()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def functions_of(options, variant, names):
    """The op, eager attention and the definition, of query, key, value and the named parameters."""
    variant = dict(variant)
    buckets = variant.pop("buckets", None)

    def options_of(parameters):
        given = dict(zip(names, parameters, strict=True))
        if "table" in given:
            given["relative_bias"] = RelativeBias(given.pop("table"), buckets)
        return {**options, "variant": AttentionVariant(**variant, **given)}

    def ours(q, k, v, *parameters):
        return sk.scaled_dot_product_attention(
            q, k, v, **options_of(parameters), enable_gqa=True, return_lse=True, backend="cpu"
        )

    def definition(q, k, v, *parameters, dtype=None):
        call = call_of((q, k, v), {**options_of(parameters), "enable_gqa": True})
        return scaled_dot_product_attention_reference(q, k, v, call, dtype)

    def eager(q, *inputs):
        return definition(q, *inputs, dtype=q.dtype)

    return with_seed(ours), with_seed(eager), with_seed(definition)


def random_inputs(shape, dtype, Dv=None, lengths=None):
    """query, key, value of (B, H, Hkv, Tq, Tk, D), ragged if there are lengths."""
    torch.manual_seed(1)
    B, H, Hkv, Tq, Tk, D = shape
    if lengths is None:
        sizes = (B, H, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv or D)
    else:
        q, k = (sum(n) for n in lengths)
        sizes = (q, H, D), (k, Hkv, D), (k, Hkv, Dv or D)
    return tuple(torch.randn(size).to(dtype) for size in sizes)


def everything(shape, dtype, lengths=None):
    """Every feature at once: inputs, options, variant and the parameters' names."""
    B, H, _, Tq, Tk, _ = shape
    inputs = random_inputs(shape, dtype, Dv=24, lengths=lengths)
    bias = torch.randn(B, 1, Tq, Tk).to(dtype)
    parameters = bias, torch.randn(H), torch.randn(7, H).to(dtype)
    mask = torch.rand(1, H, Tq, Tk) < 0.9
    options = {"attn_mask": mask, "dropout_p": 0.1}
    if lengths is not None:
        options["cu_seqlens"] = tuple(cu_of(n, "cpu") for n in lengths)
    variant = {
        "window": (40, 30),
        "causal_offset": torch.arange(B, dtype=torch.int32) * 5,
        "alibi_slopes": torch.rand(B, H) / 10,
        "softcap": 3.0,
        "buckets": torch.randint(7, (41,), dtype=torch.int32),
    }
    return (*inputs, *parameters), options, variant, PARAMETERS


DECODE = {
    "one query": ((2, 4, 2, 1, 1100, 64), {"key_lengths": ints(1100, 700)}, {}),
    "more heads than lanes": ((1, 20, 1, 1, 600, 16), {}, {}),
    "chunk": ((2, 2, 2, 5, 1030, 33), {"is_causal": True}, {"causal_offset": ints(1025, 510)}),
    "grouped chunk": ((1, 6, 2, 7, 700, 20), {"is_causal": True}, {"causal_offset": 600}),
    "sixteen": ((1, 2, 1, 16, 1100, 48), {"is_causal": True}, {"causal_offset": 1084}),
    "window": ((2, 2, 1, 3, 1600, 16), {}, {"window": (90, 0), "causal_offset": ints(1597, 560)}),
    "dropout": ((1, 2, 2, 4, 1100, 8), {"dropout_p": 0.3}, {}),
    "some see nothing": ((3, 2, 1, 2, 600, 8), {"key_lengths": ints(600, 0, 1)}, {}),
}


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", DECODE)
def test_few_queries_on_many_keys(each_isa, case, dtype, sinks):
    shape, options, variant = DECODE[case]
    inputs = random_inputs(shape, dtype)
    if sinks:
        inputs = *inputs, torch.randn(shape[1])
    ours, eager, definition = functions_of(options, variant, ["sinks"] if sinks else [])
    expected = eager(*inputs)
    truth = definition(*(t.double() for t in inputs))
    for isa in each_isa():
        for name, actual, *others in zip(("y", "lse"), ours(*inputs), expected, truth, strict=True):
            assert_no_worse(actual, *others, what=f"{name} on {isa}")


@pytest.mark.parametrize("Tq", [1, 3, 16])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_decoded_row_does_not_depend_on_the_batch(dtype, Tq):
    q, k, v = random_inputs((5, 4, 2, Tq, 1500, 64), dtype)
    lengths = ints(1500, 30, 513, 1024, 1)

    def attend(b):
        return sk.scaled_dot_product_attention(
            *(q[b], k[b], v[b]), key_lengths=lengths[b], enable_gqa=True, backend="cpu"
        )

    whole = attend(slice(0, 5))
    for b in range(5):
        assert torch.equal(whole[b], attend(slice(b, b + 1))[0]), b


@pytest.mark.parametrize("cut", ["decoded", "tiled", "ragged"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_everything_on_every_instruction_set_and_number_of_threads(each_isa, dtype, cut):
    lengths = ([4, 70, 0, 33], [90, 50, 3, 60]) if cut == "ragged" else None
    shape = {
        "decoded": (2, 4, 2, 6, 1100, 32),
        "tiled": (2, 4, 2, 70, 90, 32),
        "ragged": (4, 4, 2, 65, 85, 32),
    }[cut]
    inputs, *rest = everything(shape, dtype, lengths)
    ours, *others = functions_of(*rest)
    threads = torch.get_num_threads()
    for isa in each_isa():
        assert_op_matches(ours, *others, inputs)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_with_gradients(ours, inputs))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            assert all(torch.equal(r[name], expected) for r in results[1:]), (isa, name)


# Several items of 256 queries, blocks of 512 keys and tiles of 24 and 48 queries, or with AMX
# blocks of 256 and tiles of 32 and 64.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("window", [(0, 0), (30, 5), (600, None), (None, 20), (100, 0)], ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_band_over_many_blocks(each_isa, window, sinks, dtype):
    inputs = random_inputs((1, 4, 2, 560, 1200, 16), dtype)
    inputs = (*inputs, torch.randn(4)) if sinks else inputs
    variant = {"window": window, "causal_offset": 550}
    functions = functions_of({}, variant, ["sinks"] if sinks else [])
    for _ in each_isa():
        assert_op_matches(*functions, inputs)


# 1 / sqrt(D) is no power of two: scaling rounds the scores. dq and dk are not compared: they are
# zero but where two scores are nearly the same, and there a score's last bit decides. Eager is the
# definition in float32: torch's kernel gives NaN from 1e10 on.
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("D", [24, 128])
@pytest.mark.parametrize("largest", [400, 1e5, 1e7, 1e10])
@pytest.mark.parametrize("queries", [8, 40])
def test_large_scores(each_isa, queries, largest, D, dtype):
    q, k, v = random_inputs((1, 2, 2, queries, 1200, D), dtype)
    size = (largest / (q.float() @ k.float().mT).abs().max().item() * D**0.5) ** 0.5

    def definition(q, k, v):
        return scaled_dot_product_attention_reference(q, k, v, call_of((q, k, v), {}))[0]

    def ours(q, k, v):
        return sk.scaled_dot_product_attention(q, k, v, backend="cpu")

    q, k = q * size, k * size
    for _ in each_isa():
        assert_op_matches(
            *(lambda v, f=f: f(q, k, v) for f in (ours, definition)),
            lambda v: definition(q.to(v.dtype), k.to(v.dtype), v),
            (v,),
        )
        assert all(x.isfinite().all() for x in run_with_gradients(ours, (q, k, v)).values())


@pytest.mark.skipif("amx" not in _isas_available(), reason="this processor has no AMX")
def test_the_layout_of_amx_registers_is_put_back():
    """oneDNN's, between two calls of ours, on every thread."""
    q, k, v = random_inputs((2, 8, 8, 512, 512, 64), torch.bfloat16)
    x = torch.randn(512, 512).bfloat16()
    product = x @ x
    y = sk.scaled_dot_product_attention(q, k, v, backend="cpu")
    for _ in range(3):
        assert torch.equal(x @ x, product)
        assert torch.equal(sk.scaled_dot_product_attention(q, k, v, backend="cpu"), y)


@pytest.mark.parametrize("queries", [2000, 4], ids=["tiled", "decoded"])
def test_what_lies_outside_the_band_is_not_read(queries):
    q, k, v = random_inputs((1, 1, 1, queries, 2000, 16), torch.float32)
    k[:, :, :900], v[:, :, 1500:] = float("nan"), float("nan")
    variant = AttentionVariant(window=(60, 10), causal_offset=2000 - queries)

    def ours(q, k, v):
        return sk.scaled_dot_product_attention(q, k, v, variant=variant, backend="cpu")

    results = run_with_gradients(ours, (q, k, v))
    if queries == 2000:
        # An item is 256 queries, whose first is 1024 here; a backward tile is 48 of them.
        seen = slice(1024, 1280)
        assert results["output 0"][:, :, seen].isfinite().all()
        assert results["gradient 0"][:, :, 1056:1440].isfinite().all()
        assert results["gradient 1"][:, :, 1100:1380].isfinite().all()
    v = v.nan_to_num(0.0)
    y = ours(q, k, v)
    assert y[:, :, -4:].isfinite().all()


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("sizes", [*itertools.product([1, 0], repeat=4)], ids=str)
def test_gradient_of_every_broadcast_bias(sizes, ragged):
    lengths = ([21, 60, 50], [40, 33, 70]) if ragged else None
    shape = 3, 4, 2, 60, 70, 16
    full = 3, 4, 60, 70
    inputs = random_inputs(shape, torch.float32, lengths=lengths)
    options = {"cu_seqlens": tuple(cu_of(n, "cpu") for n in lengths)} if ragged else {}
    bias = torch.randn([n if whole else 1 for n, whole in zip(full, sizes, strict=True)])
    # Sinks, since without them the gradients of a row's scores sum to zero: there is no digit
    # of a bias' gradient to compare where it is broadcast over the keys.
    inputs = *inputs, bias, torch.randn(4)
    assert_op_matches(*functions_of(options, {"softcap": 4.0}, ["bias", "sinks"]), inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_a_shared_bias_over_many_blocks(each_isa, dtype):
    inputs = random_inputs((2, 2, 1, 110, 1100, 8), dtype)
    inputs = *inputs, torch.randn(1, 2, 110, 1100).to(dtype)
    functions = functions_of({"key_lengths": ints(1100, 610)}, {}, ["bias"])
    for _ in each_isa():
        assert_op_matches(*functions, inputs)


ENDS = [(9, 70), (60, 13), (9, 13), (1, 13), (9, 1), (80, 90)]


@pytest.mark.parametrize(
    "what, size", [*itertools.product(["bias", "mask"], ENDS), ("mask", (0, 70))], ids=str
)
def test_ragged_bias_and_mask_end_early(what, size):
    lengths = [3, 60, 20], [70, 50, 9]
    inputs = random_inputs((3, 2, 1, 60, 70, 16), torch.float32, lengths=lengths)
    options = {"cu_seqlens": tuple(cu_of(n, "cpu") for n in lengths)}
    names = []
    # A view, so that what lies past its end is other memory of this tensor: NaN, or True.
    if what == "mask":
        options["attn_mask"] = torch.ones(3, 1, 100, 100).bool()[:, :, : size[0], : size[1]]
    else:
        memory = torch.full((3, 1, 100, 100), float("nan"))
        bias = memory[:, :, : size[0], : size[1]]
        inputs, names = (*inputs, bias.normal_()), ["bias"]
    assert_op_matches(*functions_of(options, {}, names), inputs)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bias_and_mask_of_any_strides(dtype, order):
    back = [order.index(n) for n in range(4)]
    inputs = random_inputs((2, 2, 1, 20, 90, 8), dtype)

    def laid_out(x):
        return x.permute(order).contiguous().permute(back)

    mask, bias = laid_out(torch.rand(2, 2, 20, 90) < 0.7), torch.randn(2, 2, 20, 90).to(dtype)
    ours, eager, definition = functions_of({"attn_mask": mask}, {}, ["bias"])

    def strided(q, k, v, bias):
        return ours(q, k, v, laid_out(bias))

    assert_op_matches(strided, eager, definition, (*inputs, bias))


@pytest.mark.parametrize("softcap", [1e4, 1.0, 0.02])  # arguments of tanh near 0, 1 and 50
def test_softcap_keeps_the_last_digits(each_isa, softcap):
    inputs = random_inputs((1, 2, 2, 40, 50, 16), torch.float32)
    functions = functions_of({"scale": 1.0}, {"softcap": softcap}, [])
    for _ in each_isa():
        assert_op_matches(*functions, inputs)


@pytest.mark.parametrize("offset", [0, 25, -300, 300])
@pytest.mark.parametrize("reach", [0, 6, 200])
def test_relative_bias_near_and_far(each_isa, reach, offset):
    inputs = random_inputs((2, 8, 2, 40, 70, 16), torch.float32)
    table, sinks = torch.randn(9, 8), torch.randn(8)
    buckets = torch.randint(9, (2 * reach + 1,), dtype=torch.int32)
    variant = {"buckets": buckets, "causal_offset": offset}
    functions = functions_of({}, variant, ["sinks", "table"])
    for _ in each_isa():
        assert_op_matches(*functions, (*inputs, sinks, table))


@pytest.mark.parametrize("Dv", [1, 40, 512, 700])
@pytest.mark.parametrize("Tq", [3, 30])
def test_values_of_another_width(each_isa, Tq, Dv):
    inputs = random_inputs((1, 2, 1, Tq, 150, 520), torch.bfloat16, Dv=Dv)
    for _ in each_isa():
        assert_op_matches(*functions_of({"is_causal": True}, {}, []), inputs)


@pytest.mark.parametrize("Tq", [3, 300])
def test_a_sink_of_rows_that_see_nothing(Tq):
    q, k, v = random_inputs((2, 2, 1, Tq, 40, 8), torch.float32)
    options = {"key_lengths": ints(40, 0)}
    inputs = q, k, v, torch.tensor([0.5, -float("inf")])
    functions = functions_of(options, {"window": (5, 5), "causal_offset": -2}, ["sinks"])
    assert_op_matches(*functions, inputs)
    y, lse = functions[0](*inputs)
    assert (y[1] == 0).all() and (lse[1, 0] == 0.5).all() and (lse[1, 1] == -torch.inf).all()


def test_your_own_functions_are_refused_in_one_sentence():
    jitted = SimpleNamespace(fn=None)
    function = ScoreFunction(mask=jitted, torch_mask=lambda *a: a[3] >= 0)
    q, k, v = random_inputs((1, 1, 1, 4, 4, 8), torch.float32)
    with pytest.raises(sk.BackendError, match=f"{NAME}: cpu was asked for, but your own score"):
        variant = AttentionVariant(score=function)
        sk.scaled_dot_product_attention(q, k, v, variant=variant, backend="cpu")
