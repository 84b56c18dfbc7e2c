import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    device_of,
    maybe_compiled,
    skip_unsupported,
    with_seed,
)

import slimkernels as sk
from slimkernels.ops._dropout import draw_seed, keep_mask
from slimkernels.ops.scaled_dot_product_attention import (
    _pairs,
    scaled_dot_product_attention_forward,
)
from slimkernels.ops.scaled_dot_product_attention import (
    scaled_dot_product_attention_reference as attention_reference,
)
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

NAME = "scaled_dot_product_attention"

# B, H, Hkv, Tq, Tk, D, and options. key_lengths and cu_seqlens become int32 tensors.
DENSE = {
    "one": ((1, 1, 1, 1, 1, 1), {}),
    "narrow": ((2, 2, 2, 9, 9, 8), {}),
    "odd": ((1, 2, 2, 37, 37, 33), {"is_causal": True}),
    "cross": ((2, 4, 2, 5, 70, 64), {}),
    "cross causal": ((1, 2, 1, 21, 6, 16), {"is_causal": True, "scale": -0.7}),
    "lengths": ((3, 2, 1, 7, 19, 80), {"key_lengths": [19, 5, 0]}),
    "lengths causal": ((2, 1, 1, 20, 20, 16), {"key_lengths": [3, 17], "is_causal": True}),
    "dropout": ((2, 2, 1, 33, 40, 32), {"dropout_p": 0.3, "key_lengths": [40, 21]}),
    "dropout causal": ((1, 3, 3, 24, 24, 8), {"dropout_p": 0.6, "is_causal": True}),
    "scale zero": ((2, 2, 1, 9, 40, 16), {"scale": 0.0, "key_lengths": [40, 21]}),
    "no queries": ((2, 1, 1, 0, 5, 8), {}),
    "no keys": ((2, 1, 1, 5, 0, 8), {}),
    "no batch": ((0, 2, 1, 5, 5, 8), {}),
}
# Lengths of the queries, and of the keys where they differ.
RAGGED = {
    "one": ((4, 4, 8), [5], None, {}),
    "several": ((2, 2, 64), [3, 17, 1, 30], None, {}),
    "empty ones": ((2, 1, 33), [0, 9, 0, 0, 12, 0], None, {"is_causal": True}),
    "cross": ((4, 2, 16), [8, 1, 20], [2, 33, 7], {}),
    "cross, one side empty": ((2, 2, 8), [6, 0, 4], [0, 5, 9], {"is_causal": True}),
    "dropout": ((2, 1, 80), [11, 26], None, {"dropout_p": 0.25}),
    "dropout cross": ((3, 3, 32), [7, 0, 16], [18, 3, 5], {"dropout_p": 0.4, "is_causal": True}),
    "nothing": ((2, 2, 8), [], None, {}),
}


def cu_of(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def dense_case(name, dtype, device):
    """query, key, value as views of one buffer whose tokens are outermost, and the options."""
    (B, H, Hkv, Tq, Tk, D), options = DENSE[name]
    options = dict(options)
    if "key_lengths" in options:
        options["key_lengths"] = torch.tensor(
            options["key_lengths"], dtype=torch.int32, device=device
        )
    return strided((B, Tq, H), (B, Tk, Hkv), D, dtype, device, swap=True), options


def ragged_case(name, dtype, device):
    (H, Hkv, D), lengths_q, lengths_k, options = {**RAGGED, **MANY_SEQUENCES}[name]
    cu_seqlens = cu_of(lengths_q, device)
    if lengths_k is not None:
        cu_seqlens = cu_seqlens, cu_of(lengths_k, device)
    tokens = sum(lengths_q), sum(lengths_q if lengths_k is None else lengths_k)
    inputs = strided((tokens[0], H), (tokens[1], Hkv), D, dtype, device)
    return inputs, {**options, "cu_seqlens": cu_seqlens}


def strided(rows_q, rows_k, D, dtype, device, swap=False):
    torch.manual_seed(0)
    q = torch.randn(*rows_q, D + 3, device=device).to(dtype)[..., 1 : D + 1]
    k, v = torch.randn(*rows_k, 2, D, device=device).to(dtype).unbind(-2)
    return tuple(t.transpose(1, 2) for t in (q, k, v)) if swap else (q, k, v)


def functions_of(backend, inputs, options, compiled=False):
    """The op, eager attention in the inputs' dtype, and the definition, from the same seed."""
    *_, dropout_p, is_causal, scale, key_lengths, cu_q, cu_k = sk.dispatch.OPS[NAME].arguments(
        *inputs, **options
    )
    lengths = key_lengths, cu_q, cu_k

    def ours(q, k, v):
        return sk.scaled_dot_product_attention(q, k, v, **options, backend=backend)

    def eager(q, k, v):
        ragged = cu_q is not None
        q, k, v = (t.transpose(0, 1) if ragged else t for t in (q, k, v))
        k, v = (t.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for t in (k, v))
        visible, rows, cols = _pairs(q, k, is_causal, *lengths)
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, torch.finfo(q.dtype).min)
        p = scores.softmax(-1).masked_fill(~visible, 0.0)
        if dropout_p:
            p = p * keep_mask(draw_seed(q.device), rows, cols, dropout_p) / (1 - dropout_p)
        y = p @ v
        return y.transpose(0, 1) if ragged else y

    def reference(q, k, v):
        seed = draw_seed(q.device) if dropout_p else None
        return attention_reference(q, k, v, dropout_p, is_causal, scale, *lengths, seed)

    return with_seed(maybe_compiled(ours, compiled)), with_seed(eager), with_seed(reference)


def check(backend, inputs, options, compiled=False):
    skip_unsupported(NAME, backend, *inputs, **options)
    assert_op_matches(*functions_of(backend, inputs, options, compiled), inputs)


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
MANY_SEQUENCES = {
    "long and empty": ((2, 1, 16), [150, 0, 1, 290, 0, 0, 64], None, {"is_causal": True}),
    "long cross": ((2, 2, 8), [5, 130, 0, 40], [260, 3, 7, 128], {"dropout_p": 0.3}),
    # More sequences than one load of cu_seqlens finds.
    "crowded": ((1, 1, 8), [3, *[0] * 125, 2, 1, 0, 40], None, {}),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", MANY_TILES)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_lse_is_saved_in_float32(backend, dtype):
    device = device_of(backend)
    ragged = ragged_case("cross, one side empty", dtype, device)
    for inputs, options in (dense_case("lengths", dtype, device), ragged):
        skip_unsupported(NAME, backend, *inputs, **options)
        arguments = sk.dispatch.OPS[NAME].arguments(*inputs, **options)
        q, k, _, _, is_causal, scale, *lengths = arguments
        _, lse = scaled_dot_product_attention_forward(*arguments, None, backend)

        def expected(wide, q=q, k=k, options=(is_causal, *lengths), scale=scale):
            q, k = (t.to(wide).transpose(0, 1) if t.dim() == 3 else t.to(wide) for t in (q, k))
            k = k.repeat_interleave(q.shape[-3] // k.shape[-3], -3)
            visible, _, _ = _pairs(q, k, *options)
            return (q @ k.mT * scale).masked_fill(~visible, -torch.inf).logsumexp(-1)

        assert_no_worse(lse, expected(torch.float32), expected(torch.float64), what="lse")


def test_heads_too_wide_for_triton():
    x = torch.zeros(1, 1, 4, 300, device=device_of("triton"))
    with pytest.raises(sk.BackendError, match="a head may be at most 256 wide and has 300"):
        sk.scaled_dot_product_attention(x, x, x, backend="triton")


@pytest.mark.parametrize("mean", [10.0, -30.0])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_large_scores(backend, mean):
    # Scores from hundreds below zero to hundreds above: exp overflows without the maximum.
    inputs, options = dense_case("cross", torch.float32, device_of(backend))
    q, k, v = inputs
    check(backend, (q + mean, k * 3, v), options)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_sequences_never_see_each_other(backend):
    inputs, options = ragged_case("several", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **options)
    ours, _, _ = functions_of(backend, inputs, {**options, "dropout_p": 0.2})
    dy = torch.randn(inputs[0].shape, device=inputs[0].device)
    before = run_with_gradients(ours, inputs, (dy,))
    second = slice(3, 20)
    changed = tuple(t.clone() for t in (*inputs, dy))
    for tensor in changed:
        tensor[second] = tensor[second] * -50 + 1
    after = run_with_gradients(ours, changed[:3], changed[3:])
    for name, expected in before.items():
        for others in (slice(0, 3), slice(20, None)):
            assert torch.equal(after[name][others], expected[others]), name
        assert not torch.equal(after[name][second], expected[second]), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_keys_past_their_length_change_nothing(backend):
    inputs, options = dense_case("lengths", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **options)
    ours, _, _ = functions_of(backend, inputs, options)
    before = run_with_gradients(ours, inputs)
    q, k, v = (t.clone() for t in inputs)
    for b, length in enumerate(options["key_lengths"].tolist()):
        k[b, :, length:] = 1e4
        v[b, :, length:] = -1e4
    after = run_with_gradients(ours, (q, k, v))
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name
    assert (before["output 0"][2] == 0).all() and (before["gradient 0"][2] == 0).all()
    assert (before["gradient 2"][1, :, 5:] == 0).all()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_padded_and_ragged_agree(backend):
    (q, k, v), options = ragged_case("several", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, q, k, v, **options)
    ragged = sk.scaled_dot_product_attention(q, k, v, **options, backend=backend)
    lengths = options["cu_seqlens"].diff()
    parts = [torch.nn.utils.rnn.pad_sequence(t.split(lengths.tolist()), True) for t in (q, k, v)]
    q, k, v = (t.transpose(1, 2) for t in parts)
    padded = sk.scaled_dot_product_attention(q, k, v, key_lengths=lengths, backend=backend)
    real = torch.arange(q.shape[2], device=q.device) < lengths[:, None]
    # One query's arithmetic is the same in both forms; tiles may differ.
    torch.testing.assert_close(padded.transpose(1, 2)[real], ragged)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_expanded_gradient_and_scattered_elements(backend):
    inputs, options = dense_case("dropout", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **options)
    ours, _, _ = functions_of(backend, inputs, options)
    dy = torch.randn(1, 1, 1, 1, device=inputs[0].device).expand(inputs[0].shape)
    scattered = tuple(t.mT.contiguous().mT for t in inputs)
    expected = run_with_gradients(ours, inputs, (dy.contiguous(),))
    leaves = [t.requires_grad_() for t in scattered]
    y = ours(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    for actual, name in zip((y, *gradients), expected, strict=True):
        assert torch.equal(actual, expected[name]), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
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
def test_not_finite_values_stay_in_their_row(backend):
    (q, k, v), _ = dense_case("odd", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, q, k, v)
    q = q.clone()
    q[0, 0, 3, 5] = float("nan")
    y = sk.scaled_dot_product_attention(q, k, v, backend=backend)
    assert y[0, 0, 3].isnan().all() and y.isnan().sum() == y.shape[-1]


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time(backend):
    inputs, options = ragged_case("dropout cross", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **options)
    ours, _, _ = functions_of(backend, inputs, options)
    first, second = run_with_gradients(ours, inputs), run_with_gradients(ours, inputs)
    for name, expected in first.items():
        assert torch.equal(second[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_autocast_does_not_touch_the_definition(dtype):
    inputs, options = ragged_case("dropout", dtype, "cpu")
    ours, _, _ = functions_of("torch", inputs, options)

    def under_autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return ours(*inputs)

    expected, actual = (run_with_gradients(f, inputs) for f in (ours, under_autocast))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_definition_is_torchs(is_causal, scale):
    q, k, v = (t.double() for t in strided((2, 9, 4), (2, 13, 2), 6, torch.float64, "cpu", True))
    ours = sk.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    options = {"is_causal": is_causal, "scale": scale, "enable_gqa": True}
    assert (ours - F.scaled_dot_product_attention(q, k, v, **options)).abs().max() < 1e-14


def test_the_definition_of_lengths_is_torchs_mask():
    q, k, v = (t.double() for t in strided((3, 9, 2), (3, 13, 2), 6, torch.float64, "cpu", True))
    lengths = torch.tensor([13, 4, 0], dtype=torch.int32)
    ours = sk.scaled_dot_product_attention(q, k, v, key_lengths=lengths)
    mask = (torch.arange(13) < lengths[:, None])[:, None, None]
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (ours - theirs).abs().max() < 1e-14


def test_the_definition_of_ragged_is_torch_on_each_sequence():
    (q, k, v), options = ragged_case("cross", torch.float64, "cpu")
    ours = sk.scaled_dot_product_attention(q, k, v, **options, is_causal=True)
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
    assert (ours - torch.cat(theirs)).abs().max() < 1e-14


Q, K = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
TOKENS = torch.randn(6, 2, 8)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "inputs, options, sentence",
    [
        (([1.0], K, K), {}, "query must be a tensor; got list"),
        ((Q.int(), K, K), {}, "query must be float32, float16, .*; got torch.int32"),
        ((Q[0], K, K), {}, r"query must be \(B, H, T, D\); got \(4, 5, 8\)"),
        ((Q, K.half(), K), {}, "key must have query's dtype torch.float32; got torch.float16"),
        ((Q, K, K.to("meta")), {}, "value must have query's device cpu; got meta"),
        ((Q, K[:1], K[:1]), {}, r"key must have query's batch and width \(2, 4, 5, 8\); got"),
        ((Q, K[..., :4], K), {}, r"key must have query's batch and width .*; got \(2, 2, 7, 4\)"),
        ((Q, K, K[:, :, :3]), {}, r"value must have key's shape \(2, 2, 7, 8\); got \(2, 2, 3, 8"),
        ((Q[:, :3], K, K), {}, "query's heads must be a multiple of key's 2; got 3"),
        ((Q[..., :0], K[..., :0], K[..., :0]), {}, r"query \(2, 4, 5, 0\) has no elements"),
        ((Q, K, K), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        ((Q, K, K), {"key_lengths": [3, 3]}, "key_lengths must be a tensor; got list"),
        ((Q, K, K), {"key_lengths": ints(3, 3).long()}, "key_lengths must be int32; got torch.int"),
        ((Q, K, K), {"key_lengths": ints(3)}, r"key_lengths must have shape \(2,\), one a .*\(1,"),
        ((Q, K, K), {"key_lengths": ints(3, 8)}, "key_lengths must be from 0 to the 7 keys; .* 8"),
        ((Q, K, K), {"key_lengths": ints(-1, 7)}, "key_lengths must be from 0 .*; got -1 to 7"),
        ((Q, K, K), {"cu_seqlens": ints(0, 2)}, r"query must be \(T, H, D\), as cu_seqlens asks"),
        ((TOKENS,) * 3, {"cu_seqlens": [0, 6]}, "cu_seqlens must be a tensor; got int"),
        ((TOKENS,) * 3, {"cu_seqlens": (ints(0, 6),) * 3}, "cu_seqlens must be a tensor or a pair"),
        ((TOKENS,) * 3, {"cu_seqlens": ints(0, 6).long()}, "cu_seqlens must be int32; got torch"),
        ((TOKENS,) * 3, {"cu_seqlens": ints(0, 6)[None]}, r"cu_seqlens must have .*; got \(1, 2\)"),
        ((TOKENS,) * 3, {"cu_seqlens": ints()}, r"cu_seqlens must have shape .*; got \(0,\)"),
        (
            (TOKENS,) * 3,
            {"cu_seqlens": ints(0, 5)},
            "cu_seqlens of query must go .*got 0 to 5",
        ),
        ((TOKENS,) * 3, {"cu_seqlens": ints(1, 6)}, "cu_seqlens of query must go .*; got 1 to 6"),
        (
            (TOKENS,) * 3,
            {"cu_seqlens": ints(0, 4, 3, 6)},
            "cu_seqlens of query must not fall",
        ),
        (
            (TOKENS,) * 3,
            {"cu_seqlens": (ints(0, 6), ints(0, 3, 6))},
            "cu_seqlens of query and key must have one length; got 2 and 3",
        ),
        (
            (TOKENS,) * 3,
            {"cu_seqlens": ints(0, 6), "key_lengths": ints(6)},
            "key_lengths must be None with cu_seqlens",
        ),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, inputs, options, sentence):
    with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
        sk.scaled_dot_product_attention(*inputs, **options, backend=backend)
