"""Attention's edges: what must not reach a query, what is not finite, what is refused."""

import pytest
import torch
from attention_cases import (
    NAME,
    call_of,
    check,
    dense_case,
    functions_of,
    ragged_case,
    with_groups,
)
from op_cases import DTYPES, KERNEL_BACKENDS, device_of, skip_unsupported

import slimkernels as sk
from slimkernels.ops._attention_reference import scaled_dot_product_attention_reference
from slimkernels.testing import assert_no_worse, run_with_gradients

ALL_BACKENDS = [*KERNEL_BACKENDS, "torch"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_lse_is_saved_in_float32(backend, dtype):
    device = device_of(backend)
    ragged = ragged_case("cross, one side empty", dtype, device)
    for inputs, options in (dense_case("lengths", dtype, device), ragged):
        options = with_groups(inputs, options)
        skip_unsupported(NAME, backend, *inputs, **options)
        _, lse = sk.scaled_dot_product_attention(
            *inputs, **options, return_lse=True, backend=backend
        )
        call, wide = call_of(inputs, options), (t.double() for t in inputs)
        _, eager = scaled_dot_product_attention_reference(*inputs, call)
        _, truth = scaled_dot_product_attention_reference(*wide, call)
        assert_no_worse(lse, eager, truth, what="lse")


def test_heads_too_wide_for_triton():
    x = torch.zeros(1, 1, 4, 520, device=device_of("triton"))
    with pytest.raises(sk.BackendError, match="a head may be at most 512 wide and has 520"):
        sk.scaled_dot_product_attention(x, x, x, backend="triton")


@pytest.mark.parametrize("mean", [10.0, -30.0])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_large_scores(backend, mean):
    # Scores from hundreds below zero to hundreds above: exp overflows without the maximum.
    inputs, options = dense_case("cross", torch.float32, device_of(backend))
    q, k, v = inputs
    check(backend, (q + mean, k * 3, v), options)


@pytest.mark.parametrize("other", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dropout_p": 0.2}], ids=str)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_sequences_never_see_each_other(backend, options, other):
    inputs, cu_seqlens = ragged_case("several", torch.float32, device_of(backend))
    options = {**options, **cu_seqlens}
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))
    ours, _, _ = functions_of(backend, inputs, options)
    tensors = *inputs, torch.randn(inputs[0].shape, device=inputs[0].device)
    before = run_with_gradients(ours, tensors[:3], tensors[3:])
    second = slice(3, 20)
    for which in ([0], [1], [2], [3], [0, 1, 2, 3]):
        changed = [t.clone() for t in tensors]
        for i in which:
            changed[i][second] = other
        after = run_with_gradients(ours, tuple(changed[:3]), tuple(changed[3:]))
        for name, expected in before.items():
            for others in (slice(0, 3), slice(20, None)):
                assert torch.equal(after[name][others], expected[others]), (which, name)
        assert not torch.equal(after["gradient 1"][second], before["gradient 1"][second]), which


@pytest.mark.parametrize("other", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("case", ["lengths", "lengths causal"])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_keys_past_their_length_change_nothing(backend, case, other):
    inputs, options = dense_case(case, torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))
    ours, _, _ = functions_of(backend, inputs, options)
    before = run_with_gradients(ours, inputs)
    q, k, v = (t.clone() for t in inputs)
    for b, length in enumerate(options["key_lengths"].tolist()):
        k[b, :, length:] = other
        v[b, :, length:] = -other
    after = run_with_gradients(ours, (q, k, v))
    for name, expected in before.items():
        assert torch.equal(after[name], expected), name
    for b, length in enumerate(options["key_lengths"].tolist()):
        for name in ("gradient 1", "gradient 2"):
            assert (before[name][b, :, length:] == 0).all(), name
        if length == 0:
            assert (before["output 0"][b] == 0).all() and (before["gradient 0"][b] == 0).all()


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_row(backend):
    (q, k, v), _ = dense_case("odd", torch.float32, device_of(backend))
    skip_unsupported(NAME, backend, q, k, v)
    q = q.clone()
    q[0, 0, 3, 5] = float("nan")
    y = sk.scaled_dot_product_attention(q, k, v, backend=backend)
    assert y[0, 0, 3].isnan().all() and y.isnan().sum() == y.shape[-1]


def overflowing_case(backend, keys, dtype=torch.float32, **options):
    """Scores of -1e60, which is -inf in float32, for the keys before `keys` of 600."""
    device = device_of(backend)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, T, 16, device=device) for T in (40, 600, 600))
    q[..., 0], k[..., 0] = 1e30, 0.0
    k[:, :, :keys, 0] = -1e30
    return tuple(t.to(dtype) for t in (q, k, v)), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 550])  # past a block of the CPU kernel, and tiles of Triton's
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_scores_of_minus_infinity(backend, keys, dtype):
    check(backend, *overflowing_case(backend, keys, dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("key_lengths", [None, 590])
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_nothing_but_minus_infinity_is_no_key(backend, key_lengths, is_causal):
    options = {"is_causal": is_causal}
    if key_lengths is not None:
        options["key_lengths"] = ints(key_lengths).to(device_of(backend))
    inputs, options = overflowing_case(backend, 600, **options)
    q, k, v = inputs
    q[:, 0, 5:] = 0.0  # these see all keys alike, the others none
    skip_unsupported(NAME, backend, *inputs, **with_groups(inputs, options))
    ours, eager, _ = functions_of(backend, inputs, options)
    results = run_with_gradients(ours, inputs)
    for name, result in results.items():
        assert result.isfinite().all(), name
    for name in ("output 0", "gradient 0"):
        assert (results[name][:, 0, :5] == 0).all() and (results[name][:, 1] == 0).all(), name
    assert (results["gradient 2"][:, 1] == 0).all()
    seen = torch.arange(6, 41) if is_causal else torch.tensor([key_lengths or 600] * 35)
    means = v[0, 0].double().cumsum(0)[seen - 1] / seen[:, None].to(v.device)
    assert_no_worse(results["output 0"][0, 0, 5:], eager(*inputs)[0, 0, 5:], means)


# For 400 tokens: falling, negative, past the end, and as large as an int32 gets.
BAD_BOUNDARIES = [
    [0, 700, 100, 400],
    [0, 1100, 0, 400],
    [0, 300, 100, 400],
    [-500, 100, -7, 400],
    [0, -(2**31), 2**31 - 1, 400],
    [2**31 - 1, 0, -(2**31), -1],
    [900, 900],
    [400],
]


@pytest.mark.parametrize(
    "dtype, is_causal", [(torch.float32, True), (torch.bfloat16, False)], ids=str
)
@pytest.mark.parametrize("boundaries", BAD_BOUNDARIES, ids=str)
def test_bad_boundaries_touch_no_other_memory(boundaries, dtype, is_causal):
    # As on a GPU, where nobody reads the boundaries first. The interpreter checks each address.
    module = sk.dispatch.OPS[NAME].modules["triton"]
    device = device_of("triton")
    q, k, v, dy = torch.randn(4, 400, 1, 8, device=device).to(dtype).unbind()
    bad, good = (ints(*values).to(device) for values in (boundaries, [0, 100, 300, 400]))
    good = good[: len(bad)]
    for cu_q, cu_k in ((bad, bad), (bad, good), (good, bad)):
        whole = ints(0, 400).to(device)
        call = call_of((q, k, v), {"cu_seqlens": whole, "is_causal": is_causal})
        call = call._replace(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
        y, lse = module.forward(q, k, v, call)
        module.backward(dy, None, q, k, v, y, lse, call, (True,) * 3 + (False,) * 3)
        few = call._replace(cu_seqlens_q=cu_q.clamp(-20, 20))
        module.forward(q[:20], k, v, few)  # decodes


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
        (
            (Q, K, K[:, :, :3]),
            {},
            r"value must have key's shape \(2, 2, 7, 8\) but for the",
        ),
        ((Q[:, :3], K, K), {}, "query's heads must be a multiple of key's 2; got 3"),
        ((Q[..., :0], K[..., :0], K[..., :0]), {}, r"query \(2, 4, 5, 0\) has no elements"),
        ((Q, K, K), {"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\); got 1.0"),
        ((Q, K, K), {"key_lengths": [3, 3]}, "key_lengths must be a tensor; got list"),
        ((Q, K, K), {"key_lengths": ints(3, 3).long()}, "key_lengths must be int32; got torch.int"),
        ((Q, K, K), {"key_lengths": ints(3)}, r"key_lengths must have shape \(2,\), one a .*\(1,"),
        ((Q, K, K), {"key_lengths": ints(3, 8)}, "key_lengths must be from 0 to the 7 keys; .* 8"),
        ((Q, K, K), {"key_lengths": ints(-1, 7)}, "key_lengths must be from 0 .*; got -1 to 7"),
        ((Q, K, K), {"cu_seqlens": ints(0, 2)}, r"query must be \(T, H, D\), as cu_seqlens asks"),
        (
            (TOKENS,) * 3,
            {"cu_seqlens": [0, 6]},
            "cu_seqlens must be a tensor or a pair .*; got list of int, int",
        ),
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
@pytest.mark.parametrize("backend", [None, *ALL_BACKENDS])
def test_bad_input_is_one_sentence(backend, inputs, options, sentence):
    options = {"enable_gqa": True, **options}
    with pytest.raises(ValueError, match=f"^{NAME}: {sentence}"):
        sk.scaled_dot_product_attention(*inputs, **options, backend=backend)
