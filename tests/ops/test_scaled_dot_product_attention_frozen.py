"""Attention that some inputs want no gradient of: the others' have the same bits."""

import functools
import itertools

import pytest
import torch
from attention_cases import NAME
from op_cases import KERNEL_BACKENDS, device_of, maybe_compiled, skip_unsupported

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops import scaled_dot_product_attention as op_module

NAMES = "query", "key", "value", "bias", "sinks", "table"
SUBSETS = [s for n in range(1, 7) for s in itertools.combinations(NAMES, n)]
FEW = [*((name,) for name in NAMES), ("key", "value"), ("query", "bias"), ("value", "table")]
every_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)


def inputs_of(backend, Tk=20, bias_batch=2, bias_heads=4):
    torch.manual_seed(0)
    # Triton's interpreter takes a second for every few programs.
    B, H, Tq = (1, 2, 5) if backend == "triton" else (2, 4, 20)
    bias = min(bias_batch, B), min(bias_heads, H), Tq, Tk
    shapes = (B, H, Tq, 16), (B, H // 2, Tk, 16), (B, H // 2, Tk, 24), bias, (H,), (7, H)
    return [torch.randn(shape, device=device_of(backend)) for shape in shapes]


def attend(backend, query, key, value, bias, sinks, table):
    """Every feature at once, with the same dropout every time."""
    generator = torch.Generator().manual_seed(1)
    buckets = torch.randint(7, (41,), generator=generator, dtype=torch.int32).to(query.device)
    variant = sk.AttentionVariant(
        bias=bias,
        sinks=sinks,
        relative_bias=sk.RelativeBias(table, buckets),
        softcap=3.0,
        window=(key.shape[2] // 2, 30),
        causal_offset=5,
    )
    options = {"dropout_p": 0.1, "variant": variant, "enable_gqa": True}
    skip_unsupported(NAME, backend, query, key, value, **options)
    torch.manual_seed(2)
    return sk.scaled_dot_product_attention(
        query, key, value, **options, return_lse=True, backend=backend
    )


def gradients_of(wanted, backend, inputs, function=attend):
    leaves = [t.clone().requires_grad_(n in wanted) for n, t in zip(NAMES, inputs, strict=True)]
    outputs = function(backend, *leaves)
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    return {name: t.grad for name, t in zip(NAMES, leaves, strict=True)}


def assert_same_bits(backend, inputs, subsets):
    expected = gradients_of(NAMES, backend, inputs)
    for wanted in subsets:
        for name, gradient in gradients_of(wanted, backend, inputs).items():
            if name in wanted:
                assert torch.equal(gradient, expected[name]), f"{name} of {wanted}"
            else:
                assert gradient is None, f"{name} of {wanted}"


@every_backend
def test_the_same_bits_whatever_is_frozen(backend):
    assert_same_bits(backend, inputs_of(backend), SUBSETS if backend == "cpu" else FEW)


@pytest.mark.parametrize("bias", [(1, 4), (2, 1)], ids=str)  # the rows of which have their own pass
@pytest.mark.parametrize("Tk", [20, 600])  # in one block and in two
def test_the_same_bits_of_every_way_through_the_cpu_kernel(Tk, bias):
    assert_same_bits("cpu", inputs_of("cpu", Tk, *bias), FEW)


# Triton's kernels make dv beside dk, and dq beside dtable.
@pytest.mark.parametrize(
    "backend, wanted",
    [*(("cpu", names) for names in FEW), ("triton", ("key",)), ("triton", ("table",))],
)
def test_the_registered_op_returns_an_empty_tensor_for_each_not_wanted(
    backend, wanted, monkeypatch
):
    calls, backward = [], op_module.scaled_dot_product_attention_backward

    def record(*args):
        calls.append((args, backward(*args)))
        return calls[-1][1]

    monkeypatch.setattr(op_module, backward.__name__, record)
    gradients_of(wanted, backend, inputs_of(backend))
    ((args, gradients),) = calls
    for name, gradient in zip(NAMES, gradients, strict=True):
        assert (gradient.numel() > 0) == (name in wanted), name
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(backward.op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("wanted", FEW, ids="-".join)
def test_triton_launches_what_is_wanted(wanted, monkeypatch):
    pytest.importorskip("triton")
    launched = []

    def stub(launch, *_):
        launched.append(launch)
        return None if launch == "dbias_of" else (None, None)

    for launch in ("dq_of", "dkdv_of", "dbias_of"):
        monkeypatch.setattr(OPS[NAME].modules["triton"], launch, functools.partial(stub, launch))
    gradients_of(wanted, "triton", inputs_of("triton"))
    makes = {"dq_of": {"query", "table"}, "dkdv_of": {"key", "value"}, "dbias_of": {"bias"}}
    assert launched == [launch for launch, names in makes.items() if names & set(wanted)]


@pytest.mark.parametrize("wanted", FEW, ids="-".join)
def test_the_cpu_kernel_is_told_what_is_wanted(wanted, monkeypatch):
    inputs = inputs_of("cpu")
    attend("cpu", *inputs)  # skips where there is no extension
    module, given = OPS[NAME].modules["cpu"], []
    run = module.run
    monkeypatch.setattr(module, "run", lambda *args: given.append(args) or run(*args))
    gradients_of(wanted, "cpu", inputs)
    pointers = given[-1][8:14]  # after the function and what is saved
    assert [p != 0 for p in pointers] == [name in wanted for name in NAMES]


@every_backend
def test_cross_attention_to_a_frozen_encoder_compiles(backend):
    def attend(backend, query, key, value, *_):
        return sk.scaled_dot_product_attention(
            query, key, value, enable_gqa=True, return_lse=True, backend=backend
        )

    inputs = inputs_of(backend)
    skip_unsupported(NAME, backend, *inputs[:3], enable_gqa=True)
    expected = gradients_of(("query",), backend, inputs, attend)
    compiled = gradients_of(("query",), backend, inputs, maybe_compiled(attend, True))
    assert torch.equal(compiled["query"], expected["query"])
    assert compiled["key"] is None and compiled["value"] is None
