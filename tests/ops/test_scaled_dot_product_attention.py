import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_cases import (
    DENSE,
    MANY_SEQUENCES,
    NAME,
    RAGGED,
    check,
    cu_of,
    dense_case,
    functions_of,
    ragged_case,
    strided,
    with_groups,
)
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
)

import slimkernels as sk
from slimkernels.testing import assert_no_worse, run_with_gradients


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_dense_matches_reference(backend, case, dtype, compiled):
    check(backend, *dense_case(case, dtype, device_of(backend)), compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", RAGGED)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_ragged_matches_reference(backend, case, dtype, compiled):
    check(backend, *ragged_case(case, dtype, device_of(backend)), compiled)


# Past the tiles' sizes, so that running maxima and sums are merged: more queries than an item of
# the CPU kernel (256) and more keys than a block (512, or 128 at width 256).
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 290, 530, 8), (1, 1, 1, 60, 150, 256), (1, 1, 1, 40, 300, 200)], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"dropout_p": 0.2, "key_lengths": [141]}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_many_blocks(each_isa, dtype, options, shape):
    B, H, Hkv, Tq, Tk, D = shape
    if "key_lengths" in options:
        options = {**options, "key_lengths": torch.tensor([141], dtype=torch.int32)}
    for _ in each_isa():
        check("cpu", strided((B, Tq, H), (B, Tk, Hkv), D, dtype, "cpu", swap=True), options)


# H, Hkv, D, lengths of the queries and of the keys, options: few queries on many keys, on average.
RAGGED_DECODING = {
    "one query each": ((4, 1, 16), [1, 1], [400, 200], {}),
    "one has most": ((2, 2, 8), [37, 0, 1], [400, 9, 500], {"is_causal": True}),
    "groups of three": ((6, 2, 24), [3, 5], [500, 130], {"dropout_p": 0.3}),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", RAGGED_DECODING)
def test_ragged_decoding(case, dtype, monkeypatch):
    decode = pytest.importorskip("slimkernels.backends.triton._attention_decode")
    splits = []

    def splits_of(*sizes):
        splits.append(true(*sizes))
        return splits[-1]

    true = decode.splits_of
    monkeypatch.setattr(decode, "splits_of", splits_of)
    (H, Hkv, D), lengths_q, lengths_k, options = RAGGED_DECODING[case]
    device = device_of("triton")
    inputs = strided((sum(lengths_q), H), (sum(lengths_k), Hkv), D, dtype, device)
    cu_seqlens = cu_of(lengths_q, device), cu_of(lengths_k, device)
    check("triton", inputs, {**options, "cu_seqlens": cu_seqlens})
    assert splits[0] > 1


# The same for the Triton kernels, whose tiles are at most 128 long: several tiles of queries and
# of keys, an uneven last one, and key lengths that end inside, between and before tiles.
MANY_TILES = {
    "plain": ({}, (1, 2, 1, 260, 270, 16)),
    "causal": ({"is_causal": True}, (1, 1, 1, 270, 270, 16)),
    "causal, more keys": ({"is_causal": True}, (1, 2, 1, 150, 280, 8)),
    "causal, more queries": ({"is_causal": True}, (1, 2, 2, 280, 150, 8)),
    "lengths": ({"key_lengths": [0, 128, 129, 300], "dropout_p": 0.2}, (4, 1, 1, 140, 300, 8)),
    "lengths causal": ({"key_lengths": [70, 256], "is_causal": True}, (2, 1, 1, 260, 256, 8)),
    "dropout causal": ({"dropout_p": 0.4, "is_causal": True}, (1, 2, 1, 150, 150, 33)),
    "wide": ({"is_causal": True, "dropout_p": 0.2}, (1, 2, 1, 80, 80, 80)),
    "widest": ({"is_causal": True}, (1, 1, 1, 70, 90, 250)),
}


# Of float32, which the interpreter takes three times as long for, those that differ most.
@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.bfloat16) for case in MANY_TILES]
    + [(case, torch.float32) for case in ("causal, more keys", "lengths causal", "widest")],
    ids=str,
)
def test_many_tiles(case, dtype):
    options, (B, H, Hkv, Tq, Tk, D) = MANY_TILES[case]
    device = device_of("triton")
    if "key_lengths" in options:
        lengths = torch.tensor(options["key_lengths"], dtype=torch.int32, device=device)
        options = {**options, "key_lengths": lengths}
    check("triton", strided((B, Tq, H), (B, Tk, Hkv), D, dtype, device, swap=True), options)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", MANY_SEQUENCES)
def test_many_tiles_of_ragged_sequences(case, dtype):
    check("triton", *ragged_case(case, dtype, device_of("triton")))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype):
    for _ in each_isa():
        for case in DENSE:
            check("cpu", *dense_case(case, dtype, "cpu"))
        for case in RAGGED:
            check("cpu", *ragged_case(case, dtype, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_same_bits_for_any_number_of_threads(each_isa, dtype):
    inputs, options = ragged_case("several", dtype, "cpu")
    inputs = tuple(t.repeat(1, 16, 1) for t in inputs)
    threads = torch.get_num_threads()
    for isa in each_isa():
        ours, _, _ = functions_of("cpu", inputs, {**options, "dropout_p": 0.1})
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run_with_gradients(ours, inputs))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            assert torch.equal(results[1][name], expected), (isa, name)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_padded_and_ragged_agree(backend):
    (q, k, v), options = ragged_case("several", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, q, k, v, **options)
    ours, eager, reference = functions_of(backend, (q, k, v), options)
    three = ours(q, k, v), eager(q, k, v), reference(q.double(), k.double(), v.double())
    lengths = options["cu_seqlens"].diff()
    parts = [torch.nn.utils.rnn.pad_sequence(t.split(lengths.tolist()), True) for t in (q, k, v)]
    q, k, v = (t.transpose(1, 2) for t in parts)
    padded = sk.scaled_dot_product_attention(q, k, v, key_lengths=lengths, backend=backend)
    real = torch.arange(q.shape[2], device=q.device) < lengths[:, None]
    for y in (padded.transpose(1, 2)[real], three[0]):  # tiles may differ
        assert_no_worse(y, *three[1:])


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_expanded_gradient_and_scattered_elements(backend):
    inputs, options = dense_case("dropout", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))
    ours, _, _ = functions_of(backend, inputs, options)
    dy = torch.randn(1, 1, 1, 1, device=inputs[0].device).expand(inputs[0].shape)
    scattered = tuple(t.mT.contiguous().mT for t in inputs)
    expected = run_with_gradients(ours, inputs, (dy.contiguous(),))
    leaves = [t.requires_grad_() for t in scattered]
    y = ours(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    for actual, name in zip((y, *gradients), expected, strict=True):
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_one_tensor_for_all_three_and_one_graph_for_all_lengths(backend):
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(x, cu_seqlens):
        return sk.scaled_dot_product_attention(x, x, x, cu_seqlens=cu_seqlens, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=graphs)
    for lengths in ([5, 3], [4, 9, 2], [2, 2, 7, 1], [17, 3, 1, 1, 1]):
        cu_seqlens = cu_of(lengths, device_of(backend))
        x = torch.randn(sum(lengths), 2, 8, device=cu_seqlens.device)
        skip_unsupported(NAME, backend, x, x, x, cu_seqlens=cu_seqlens)
        expected, actual = (
            run_with_gradients(lambda x, f=f, cu=cu_seqlens: f(x, cu), (x,))
            for f in (attend, compiled)
        )
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
    assert graphs.frame_count == 2  # the first, and one for any number of tokens and sequences


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend):
    inputs, options = ragged_case("dropout cross", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))
    ours, _, _ = functions_of(backend, inputs, options)
    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


def test_autocast_does_not_touch_the_definition():
    inputs, options = ragged_case("dropout", torch.bfloat16, "cpu")
    ours, _, _ = functions_of("torch", inputs, options)
    expected, actual = (run_with_gradients(f, inputs) for f in (ours, _under_autocast(ours)))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def _under_autocast(function):
    def call(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    return call


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32,) * 4, (torch.float32, torch.bfloat16, torch.float32, torch.float16)],
    ids=["float32", "mixed"],
)
@pytest.mark.parametrize(
    "backend, compiled", [("cpu", False), ("cpu", True), ("torch", False), ("triton", False)]
)
def test_autocast_casts_as_torch_does(backend, compiled, dtypes):
    tensors = *strided((2, 9, 4), (2, 13, 4), 6, torch.float32, "cpu", True), torch.randn(9, 13)
    inputs = tuple(t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True))
    skip_unsupported(NAME, backend, *(t.bfloat16() for t in inputs))

    def ours(*inputs):
        return sk.scaled_dot_product_attention(*inputs, backend=backend)

    for function in (F.scaled_dot_product_attention, ours):
        autocast = maybe_compiled(_under_autocast(function), compiled and function is ours)
        actual = run_with_gradients(autocast, inputs)
        expected = run_with_gradients(
            lambda *ts, f=function: f(*(t.bfloat16() for t in ts)), inputs
        )
        for name in expected:
            assert actual[name].dtype == expected[name].dtype, name
            assert torch.equal(actual[name], expected[name]), name


def test_autocast_is_looked_at_by_each_call():
    q, k, v = strided((2, 9, 4), (2, 13, 4), 6, torch.float32, "cpu", True)
    attend, autocast = sk.scaled_dot_product_attention, _under_autocast
    for function in (attend, autocast(attend), attend, autocast(attend)):
        expected = torch.float32 if function is attend else torch.bfloat16
        assert function(q, k, v).dtype == expected
    with pytest.raises(ValueError, match="key must have query's dtype torch.float32; got"):
        attend(q, k.bfloat16(), v)
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta")):  # torch leaves both
        inputs = [t.to(device, dtype) for t in (q, k, v)]
        theirs = autocast(F.scaled_dot_product_attention)(*inputs)
        assert autocast(attend)(*inputs).dtype == theirs.dtype == dtype
    with pytest.raises(ValueError, match="key must have query's dtype torch.float32; got"):
        autocast(attend)(q, k.double(), v)


def test_autocast_takes_a_variants_parameters_along():
    q, k, v = strided((2, 9, 4), (2, 9, 4), 6, torch.float16, "cpu", True)
    bias, sinks, table = torch.randn(9, 9), torch.randn(4).half(), torch.randn(3, 4).half()
    buckets = torch.tensor([0, 1, 2], dtype=torch.int32)

    def call(q, k, v, sinks, table):
        variant = sk.AttentionVariant(
            bias=bias, sinks=sinks, relative_bias=sk.RelativeBias(table, buckets)
        )
        return sk.scaled_dot_product_attention(q, k, v, variant=variant)

    given = q, k, v, sinks, table
    assert torch.equal(_under_autocast(call)(*given), call(*(t.bfloat16() for t in given)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_definition_is_torchs(is_causal, scale):
    q, k, v = (t.double() for t in strided((2, 9, 4), (2, 13, 2), 6, torch.float64, "cpu", True))
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
    ours = sk.scaled_dot_product_attention(q, k, v, **options)
    theirs = F.scaled_dot_product_attention(q, k, v, **options)
    assert_rounding_alone(ours, theirs, terms=6 + 13)  # of a score, then of values


def test_the_definition_of_lengths_is_torchs_mask():
    q, k, v = (t.double() for t in strided((3, 9, 2), (3, 13, 2), 6, torch.float64, "cpu", True))
    lengths = torch.tensor([13, 4, 0], dtype=torch.int32)
    ours = sk.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
    mask = (torch.arange(13) < lengths[:, None])[:, None, None]
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_rounding_alone(ours, theirs, terms=6 + 13)


def test_the_definition_of_ragged_is_torch_on_each_sequence():
    (q, k, v), options = ragged_case("cross", torch.float64, "cpu")
    ours = sk.scaled_dot_product_attention(q, k, v, **options, is_causal=True, enable_gqa=True)
    lengths = [cu.diff().tolist() for cu in options["cu_seqlens"]]
    parts = zip(
        *(t.split(n) for t, n in zip((q, k, v), (lengths[0], *lengths[1:] * 2), strict=True)),
        strict=True,
    )
    theirs = [
        F.scaled_dot_product_attention(
            *(t.transpose(0, 1) for t in part), is_causal=True, enable_gqa=True
        ).transpose(0, 1)
        for part in parts
    ]
    assert_rounding_alone(ours, torch.cat(theirs), terms=q.shape[-1] + max(lengths[1]))


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_sizes_and_numbers_that_torch_compile_does_not_know(backend):
    inputs, options = dense_case("cross causal", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))

    def attend(q, k, v, scale):
        variant = sk.AttentionVariant(relative_bias=sk.t5_relative_bias(table, max_distance=20))
        return sk.scaled_dot_product_attention(
            q, k, v, scale=scale, dropout_p=0.0, is_causal=True, variant=variant, backend=backend
        )

    table = torch.randn(16, inputs[0].shape[1], device=inputs[0].device)
    inputs = tuple(t.contiguous() for t in inputs)
    k, v = (t.repeat_interleave(inputs[0].shape[1] // t.shape[1], 1) for t in inputs[1:])
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for scale in (0.3, -0.7):
        assert torch.equal(compiled(inputs[0], k, v, scale), attend(inputs[0], k, v, scale))
