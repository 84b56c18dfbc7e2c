import pytest
import torch
from op_cases import (
    DTYPES,
    KERNEL_BACKENDS,
    assert_rounding_alone,
    device_of,
    maybe_compiled,
    skip_unsupported,
)

import slimkernels as sk
from slimkernels.ops.rotary import rotary_reference
from slimkernels.testing import assert_no_worse, assert_op_matches, run_with_gradients

# B, heads of query, of key, T, D, rotary_dim
SIZES = [
    *((1, 1, 1, 1, 2, 2), (2, 3, 1, 5, 24, 24), (2, 4, 2, 7, 40, 16), (1, 2, 2, 33, 64, 64)),
    *((3, 2, 1, 2, 7, 6), (1, 5, 3, 3, 80, 34), (0, 2, 2, 3, 8, 8), (2, 2, 2, 0, 8, 8)),
    *((2, 0, 1, 3, 8, 8), (1, 40, 2, 2, 128, 128)),  # the last: heads of several tiles
]
LAYOUTS = [False, True]
ROWS = 50


def inputs_of(size, dtype, device):
    """query and key; tables."""
    B, H, Hkv, T, D, rotary_dim = size
    torch.manual_seed(0)
    query, key = (torch.randn(B, h, T, D, device=device).to(dtype) for h in (H, Hkv))
    return (query, key), tuple(t.to(device) for t in sk.rotary_tables(ROWS, rotary_dim))


def positions_of(query, offset=0, position_ids=None):
    """(B, T), or (1, T)."""
    if position_ids is not None:
        return position_ids.view(-1, query.shape[2])
    tokens = torch.arange(query.shape[2], device=query.device)[None]
    return tokens + (offset[:, None] if isinstance(offset, torch.Tensor) else offset)


def functions_of(backend, tables, interleaved, compiled=False, **where):
    """The op, eager PyTorch as Hugging Face has it, and the definition."""

    def ours(query, key):
        return sk.rotary(query, key, *tables, interleaved=interleaved, backend=backend, **where)

    def eager(query, key):
        def turned(x):
            at = positions_of(query, **where)[:, None]
            cos, sin = (t.to(x.dtype)[at] for t in tables)
            repeat = (lambda t: t.repeat_interleave(2, -1)) if interleaved else by_halves
            half = cos.shape[-1]
            x, rest = x[..., : 2 * half], x[..., 2 * half :]
            pairs = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
            other = torch.stack if interleaved else torch.cat
            swapped = other((-pairs[1], pairs[0]), -1).reshape(x.shape)
            return torch.cat((x * repeat(cos) + swapped * repeat(sin), rest), -1)

        return turned(query), turned(key)

    def reference(query, key):
        positions = positions_of(query, **where)
        outputs = rotary_reference(
            query.transpose(1, 2), key.transpose(1, 2), *tables, positions, 0, interleaved
        )
        return tuple(y.transpose(1, 2) for y in outputs)

    return maybe_compiled(ours, compiled), eager, reference


def by_halves(table):
    return torch.cat((table, table), -1)


def check(backend, inputs, tables, interleaved, compiled=False, **where):
    skip_unsupported("rotary", backend, *inputs, *tables, interleaved=interleaved, **where)
    functions = functions_of(backend, tables, interleaved, compiled, **where)
    assert_op_matches(*functions, inputs)


def where_of(kind, inputs):
    """The arguments that say which positions the tokens have."""
    B, T, device = inputs[0].shape[0], inputs[0].shape[2], inputs[0].device
    generator = torch.Generator().manual_seed(1)
    if kind == "offset":
        return {"offset": 3}
    if kind == "offsets":
        given = torch.randint(0, ROWS - 35, (B,), generator=generator)
        return {"offset": given.to(device, torch.int32)}
    shape = {"position_ids": (B, T), "shared position_ids": (T,)}[kind]
    return {"position_ids": torch.randint(0, ROWS, shape, generator=generator).to(device)}


@pytest.mark.parametrize("interleaved", LAYOUTS, ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_matches_reference(backend, size, dtype, interleaved):
    check(backend, *inputs_of(size, dtype, device_of(backend)), interleaved)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("interleaved", LAYOUTS, ids=["halves", "interleaved"])
@pytest.mark.parametrize("kind", ["offset", "offsets", "position_ids", "shared position_ids"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_positions(backend, kind, interleaved, compiled):
    for size in ((2, 3, 1, 5, 24, 16), (3, 2, 2, 1, 8, 8)):
        inputs, tables = inputs_of(size, torch.float32, device_of(backend))
        check(backend, inputs, tables, interleaved, compiled, **where_of(kind, inputs))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("offset", [0, 4, "each"])
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_a_ragged_batch_is_its_sequences(backend, offset, compiled):
    device = device_of(backend)
    lengths = [5, 0, 1, 9]
    offsets = [3, 0, 7, 2] if offset == "each" else [offset] * 4
    torch.manual_seed(0)
    query, key = (torch.randn(15, H, 24, device=device) for H in (3, 1))
    tables = tuple(t.to(device) for t in sk.rotary_tables(ROWS, 16))
    cu_seqlens = torch.tensor([0, 5, 5, 6, 15], dtype=torch.int32, device=device)
    where = {"offset": torch.tensor(offsets, device=device) if offset == "each" else offset}
    skip_unsupported("rotary", backend, query, key, *tables, cu_seqlens=cu_seqlens, **where)

    def ours(query, key):
        return sk.rotary(query, key, *tables, cu_seqlens=cu_seqlens, backend=backend, **where)

    def one_by_one(query, key):
        parts = zip(query.split(lengths), key.split(lengths), offsets, strict=True)
        pairs = [sk.rotary(q, k, *tables, offset=o, backend="torch") for q, k, o in parts]
        return tuple(torch.cat(tensors) for tensors in zip(*pairs, strict=True))

    actual = run_with_gradients(maybe_compiled(ours, compiled), (query, key))
    assert all(actual[f"output {i}"].is_contiguous() for i in (0, 1))
    eager = run_with_gradients(one_by_one, (query, key))
    for name, truth in run_with_gradients(one_by_one, (query.double(), key.double())).items():
        assert_no_worse(actual[name], eager[name], truth, what=name)
    positions = [t + o for n, o in zip(lengths, offsets, strict=True) for t in range(n)]
    positions = torch.tensor(positions, device=device)
    again = sk.rotary(query, key, *tables, position_ids=positions, backend=backend)
    assert all(map(torch.equal, again, ours(query, key)))


@pytest.mark.parametrize("interleaved", LAYOUTS, ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_instruction_set(each_isa, dtype, interleaved):
    for _ in each_isa():
        for size in SIZES:
            check("cpu", *inputs_of(size, dtype, "cpu"), interleaved)


@pytest.mark.parametrize("interleaved", LAYOUTS, ids=["halves", "interleaved"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_views_are_read_through_their_strides(backend, interleaved):
    B, T, H, D = 2, 6, 3, 24
    torch.manual_seed(0)
    qkv = torch.randn(B, T, 3, H, D, device=device_of(backend))
    tables = tuple(t.to(qkv.device) for t in sk.rotary_tables(ROWS, 16))
    query, key = (qkv[:, :, i].transpose(1, 2) for i in (0, 1))
    skip_unsupported("rotary", backend, query, key, *tables)
    ours, _, _ = functions_of(backend, tables, interleaved)
    dense = run_with_gradients(ours, (query.contiguous(), key.contiguous()))

    def packed(qkv):
        return ours(qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2))

    def last_dimension_apart(query, key):
        return ours(query.mT.contiguous().mT, torch.stack([key, key], -1)[..., 0])

    results = run_with_gradients(packed, (qkv,))
    for i in (0, 1):
        assert torch.equal(results[f"output {i}"], dense[f"output {i}"])
        gradient = results["gradient 0"][:, :, i].transpose(1, 2)
        assert torch.equal(gradient, dense[f"gradient {i}"])
    apart = run_with_gradients(last_dimension_apart, (query.contiguous(), key.contiguous()))
    for name, expected in dense.items():
        assert torch.equal(apart[name], expected), name
    dy = torch.randn(D, 1, H, B, device=qkv.device).permute(3, 2, 1, 0).expand(B, H, T, D)
    strided = run_with_gradients(ours, (query, key), (dy, dy))
    dense = run_with_gradients(ours, (query, key), (dy.contiguous(), dy.contiguous()))
    for name, expected in dense.items():
        assert torch.equal(strided[name], expected), name


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_backward_turns_back(backend):
    (query, key), tables = inputs_of((2, 3, 1, 5, 24, 16), torch.float32, device_of(backend))
    skip_unsupported("rotary", backend, query, key, *tables)
    ours, _, _ = functions_of(backend, tables, False)
    outputs = ours(query, key)
    results = run_with_gradients(ours, (query, key), outputs)
    for i, x in enumerate((query, key)):
        there_and_back = 4 * torch.finfo(x.dtype).eps * x.abs().max()
        assert (results[f"gradient {i}"] - x).abs().max() <= there_and_back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_what_is_not_turned_is_copied(backend, dtype):
    (query, key), tables = inputs_of((2, 3, 1, 5, 24, 16), dtype, device_of(backend))
    skip_unsupported("rotary", backend, query, key, *tables)
    for x, y in zip((query, key), sk.rotary(query, key, *tables, backend=backend), strict=True):
        assert torch.equal(y[..., 16:], x[..., 16:])
        assert torch.equal(y[:, :, 0], x[:, :, 0])  # position 0: an angle of 0


@pytest.mark.parametrize("interleaved", LAYOUTS, ids=["halves", "interleaved"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_not_finite_values_stay_in_their_pair(backend, interleaved):
    (query, key), tables = inputs_of((1, 2, 2, 4, 8, 8), torch.float32, device_of(backend))
    query[0, 1, 2, 0], query[0, 0, 1, 3] = float("nan"), float("inf")
    query[0, 0, 3, 2], query[0, 0, 3, 5] = 3e38, 1e-40
    skip_unsupported("rotary", backend, query, key, *tables)
    ours, _, reference = functions_of(backend, tables, interleaved)
    for actual, expected in zip(ours(query, key), reference(query, key), strict=True):
        # Element by element, since one pair is huge: two products of numbers up to 4 and their sum.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(actual, expected, rtol=2 * eps, atol=8 * eps, equal_nan=True)


@pytest.mark.parametrize("interleaved", LAYOUTS, ids=["halves", "interleaved"])
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_an_unseen_position_outside_the_tables_is_nan(backend, interleaved):
    """Where the host may not look: here a compiled call."""
    (query, key), tables = inputs_of((2, 1, 2, 3, 12, 8), torch.float32, device_of(backend))
    position_ids = torch.tensor([[0, -1, 49], [50, 2**40, -(2**40)]], device=query.device)
    skip_unsupported("rotary", backend, query, key, *tables)
    ours, _, reference = functions_of(
        backend, tables, interleaved, compiled=True, position_ids=position_ids
    )
    results = (f(query, key) for f in (ours, reference))
    truths = reference(query.double(), key.double())
    for actual, eager, truth in zip(*results, truths, strict=True):
        assert actual[..., :8].isnan().any(-1).sum() == 4 * actual.shape[1]
        assert_no_worse(actual, eager, truth)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_bfloat16_tables(backend):
    inputs, tables = inputs_of((2, 3, 1, 5, 24, 16), torch.bfloat16, device_of(backend))
    check(backend, inputs, tuple(t.bfloat16() for t in tables), False)


def test_tables_that_want_gradients_get_them_from_torch():
    (query, key), tables = inputs_of((2, 3, 1, 5, 24, 16), torch.float32, "cpu")
    tables = tuple(t.requires_grad_() for t in tables)
    assert sk.explain(sk.rotary, query, key, *tables).startswith("rotary runs on torch")
    y, _ = sk.rotary(query, key, *tables)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum() + y.sum(), tables))
    with pytest.raises(sk.BackendError, match="no gradient to cos and sin"):
        sk.rotary(query, key, *tables, backend="cpu")


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_same_bits_every_time_and_for_any_number_of_threads(backend, each_isa):
    size = (2, 8, 2, 40, 64, 48) if backend == "cpu" else (1, 3, 1, 5, 24, 16)
    inputs, tables = inputs_of(size, torch.float32, device_of(backend))
    skip_unsupported("rotary", backend, *inputs, *tables)
    ours, _, _ = functions_of(backend, tables, False)
    threads = torch.get_num_threads()
    for isa in each_isa() if backend == "cpu" else [None]:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run_with_gradients(ours, inputs))
        torch.set_num_threads(threads)
        for name, expected in results[0].items():
            assert all(torch.equal(other[name], expected) for other in results), (isa, name)


def test_the_definition_is_that_of_the_paper():
    """A pair as a complex number, times e^(i t theta), in float64."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 30, 8, dtype=torch.float64).unbind()
    angles = torch.outer(torch.arange(30.0).double(), 100.0 ** -(torch.arange(4.0).double() / 4))
    tables = angles.cos(), angles.sin()
    turn = torch.polar(torch.ones_like(angles), angles)
    for interleaved in LAYOUTS:
        y, _ = sk.rotary(query, key, *tables, interleaved=interleaved)
        pairs = query if interleaved else query.unflatten(-1, (2, 4)).mT.flatten(-2)
        expected = torch.view_as_real(torch.view_as_complex(pairs.unflatten(-1, (4, 2))) * turn)
        expected = expected if interleaved else expected.mT
        assert_rounding_alone(y, expected.flatten(-2), terms=2)
    cos, sin = sk.rotary_tables(30, 8, base=100.0)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, tables[0].float()) and torch.equal(sin, tables[1].float())
    halved = sk.rotary_tables(30, 8, base=100.0, scale=0.5)
    assert torch.equal(halved[0][::2], cos[:15]) and torch.equal(halved[1][::2], sin[:15])


Q, K = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8)
C, S = sk.rotary_tables(5, 8)
R, CU = Q[0], torch.tensor([0, 1, 4], dtype=torch.int32)  # R: 4 tokens of 3 heads


@pytest.mark.parametrize(
    "args, options, sentence",
    [
        (([1.0], K, C, S), {}, "query must be a tensor; got list"),
        ((Q.int(), K, C, S), {}, "query must be float32, .* or float64; got torch.int32"),
        (
            (Q[0, 0], K, C, S),
            {},
            r"query must be \(B, H, T, D\) or \(T, H, D\); got",
        ),
        ((Q, K.half(), C, S), {}, "key must have query's dtype torch.float32; got torch.float16"),
        ((Q, K[0], C, S), {}, r"key must have query's shape .*; got \(2, 3, 8\)"),
        ((Q, K[:, :, :2], C, S), {}, r"key must have query's shape .*; got \(2, 2, 2, 8\)"),
        ((Q, K, C[0], S), {}, r"cos must have shape \(positions, rotary_dim / 2\), .*; got \(4,\)"),
        ((Q, K, C.repeat(1, 2), S), {}, r"cos must have shape .* dimension 8; got \(5, 8\)"),
        ((Q, K, C.half(), S), {}, "cos must be float32 or torch.float32 like query; got torch.fl"),
        ((Q, K, C, S.to("meta")), {}, "sin must be on cpu like query; got meta"),
        ((Q, K, C, S[:4]), {}, r"sin must have cos' shape \(5, 4\) .*; got \(4, 4\)"),
        ((Q, K, C, S), {"interleaved": 1}, "interleaved must be True or False; got 1"),
        ((Q, K, C, S), {"offset": 0.5}, "offset must be an integer; got 0.5"),
        ((Q, K, C, S), {"offset": 3}, "cos must have a row for each position; it has 5, .* 3 to 5"),
        ((Q, K, C, S), {"offset": -1}, "cos must have a row for each position; .* from -1 to 1"),
        ((Q, K, C, S), {"offset": torch.tensor([0, 3])}, "cos must have a row for each position;"),
        ((Q, K, C, S), {"offset": torch.tensor([0])}, r"offset must have shape \(2,\); got \(1,\)"),
        ((Q, K, C, S), {"offset": torch.ones(2)}, "offset must be int32 or int64; got torch.float"),
        ((Q, K, C, S), {"position_ids": [0, 1, 2]}, "position_ids must be a tensor; got list"),
        (
            (Q, K, C, S),
            {"position_ids": torch.arange(4)},
            r"position_ids must have shape \(3,\) or \(2, 3\) or \(1, 3\); got \(4,\)",
        ),
        ((Q, K, C, S), {"position_ids": torch.arange(3) + 3}, "cos must have a row .* 3 to 5"),
        (
            (Q, K, C, S),
            {"position_ids": torch.arange(3), "offset": 1},
            "offset must not be given with position_ids",
        ),
        ((Q, K, C, S), {"cu_seqlens": CU}, r"cu_seqlens must be None with a query of \(B, H, T"),
        (
            (R, R, C, S),
            {"cu_seqlens": CU[:2]},
            r"cu_seqlens must be from 0 to the 4 tokens, .*",
        ),
        ((R, R, C, S), {"cu_seqlens": CU.long()}, "cu_seqlens must be int32; got torch.int64"),
        (
            (R, R, C, S),
            {"cu_seqlens": CU[:0]},
            r"cu_seqlens must have shape \(sequences \+ 1,\);",
        ),
        (
            (R, R, C, S),
            {"cu_seqlens": CU, "position_ids": torch.arange(4)},
            "cu_seqlens must not be given with position_ids",
        ),
        (
            (R, R, C, S),
            {"cu_seqlens": CU, "offset": torch.arange(3)},
            r"offset must have shape \(2,\); got \(3,\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, args, options, sentence):
    with pytest.raises(ValueError, match=f"^rotary: {sentence}"):
        sk.rotary(*args, **options, backend=backend)


@pytest.mark.parametrize(
    "args, sentence",
    [
        ((2.5, 8), "T must be an integer; got 2.5"),
        ((-1, 8), "T must not be negative; got -1"),
        ((4, 7), "dim must be even and positive; got 7"),
        ((4, 8, 0.0), "base must be positive; got 0.0"),
        ((4, 8, float("nan")), "base must be finite in float32; got nan"),
    ],
)
def test_bad_tables_are_one_sentence(args, sentence):
    with pytest.raises(ValueError, match=f"^rotary_tables: {sentence}"):
        sk.rotary_tables(*args)
