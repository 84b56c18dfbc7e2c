"""softmax's definition, what it refuses, and what it leaves to ATen."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, KERNEL_BACKENDS, assert_rounding_alone, device_of, skip_unsupported
from softmax_cases import eager_softmax, inputs_of

import slimkernels as sk
from slimkernels.dispatch import OPS
from slimkernels.ops.softmax import softmax_reference
from slimkernels.testing import assert_no_worse, assert_op_matches


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_the_definition_is_torchs(dim):
    x = inputs_of((3, 4, 5), torch.float64, "cpu")
    assert_rounding_alone(sk.softmax(x, dim), torch.softmax(x, dim), terms=x.shape[dim])
    assert_rounding_alone(
        sk.softmax(x, dim, scale=0.3), torch.softmax(x * 0.3, dim), terms=x.shape[dim]
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition_is_what_a_user_writes(masked, is_causal):
    x = inputs_of((3, 4, 5), torch.float64, "cpu")
    mask = torch.rand(3, 1, 5) < 0.5 if masked else None
    ours = softmax_reference(x, -1, 0.3, mask, is_causal)
    theirs = eager_softmax(x, scale=0.3, mask=mask, is_causal=is_causal)
    assert torch.equal(ours, theirs)


X, MASK = torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(input=[1.0]), "input must be a tensor; got list"),
        (dict(input=X.int()), "input must be float32, float16, bfloat16 or float64; got torch.int"),
        (dict(dim=2), r"dim must be in \[-2, 2\) for input \(4, 8\); got 2"),
        (dict(input=X[0, 0]), r"input must have a dimension; got shape \(\)"),
        (dict(dim=0.5), "dim must be an integer; got 0.5"),
        (dict(scale=float("nan")), "scale must be finite in float32; got nan"),
        (dict(scale=-float("inf")), "scale must be finite in float32; got -inf"),
        (dict(mask=[True]), "mask must be a tensor; got list"),
        (
            dict(mask=X.half()),
            "mask must be bool, True where an element takes part, or torch.float32 to be added; "
            "got torch.float16",
        ),
        (dict(mask=MASK.to("meta")), "mask must be on cpu like input; got meta"),
        (dict(mask=MASK[:3]), r"mask must broadcast to input \(4, 8\); got \(3, 8\)"),
        (dict(mask=MASK[None]), r"mask must broadcast to input \(4, 8\); got \(1, 4, 8\)"),
        (dict(is_causal=True, dim=0), r"is_causal needs input \(..., Tq, Tk\) and dim -1; got"),
        (dict(is_causal=True, input=X[0]), r"is_causal needs .* input \(8,\) and dim -1"),
        (dict(sinks=X[0]), r"sinks need input \(..., H, Tq, Tk\) and dim -1; got input \(4, 8\)"),
        (dict(sinks=X[0], input=X[None], dim=1), r"sinks need .* \(1, 4, 8\) and dim 1"),
        (dict(sinks=X[0], input=X[None]), r"sinks must have shape \(1,\), the heads of input"),
        (dict(dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
        (dict(training=0), "training must be True or False; got 0"),
        (dict(is_causal=1), "is_causal must be True or False; got 1"),
        (dict(mask=MASK.to_sparse()), "mask must be a dense tensor; got torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
def test_bad_input_is_one_sentence(backend, arguments, sentence):
    with pytest.raises(ValueError, match="^softmax: " + sentence):
        sk.softmax(**{"input": X, **arguments}, backend=backend)


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_rows_whose_columns_triton_cannot_count(op):
    pytest.importorskip("triton")
    x = torch.empty(1, device=device_of("triton")).expand(1, 2**31 - 4096)
    with pytest.raises(sk.BackendError, match="rows of up to 2147479551 elements"):
        getattr(sk, op)(x, backend="triton")
    assert OPS[op].unsupported("triton", *OPS[op].arguments(x[:, 1:])) is None


@pytest.mark.parametrize(
    "given, dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
@pytest.mark.parametrize("backend", [*KERNEL_BACKENDS, "torch"])
def test_dtype_casts_the_input_first(backend, op, given, dtype):
    x = (4 * torch.randn(5, 33, device=device_of(backend))).to(given)
    skip_unsupported(op, backend, x, dtype=dtype)
    ours, eager = (partial(getattr(of, op), dim=-1, dtype=dtype) for of in (sk, F))
    results = assert_op_matches(
        partial(ours, backend=backend), eager, lambda x: getattr(F, op)(x.double(), -1), (x,)
    )
    assert (results["output 0"].dtype, results["gradient 0"].dtype) == (dtype, given)
    whole = x.detach().long()
    assert torch.equal(ours(whole, backend="torch"), eager(whole))


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_masks_of_a_cast_input(op):
    """In the dtype that it had, in the one it gets, and in float32."""
    x = torch.randn(4, 8).half()
    mask = torch.randn(8).half()
    y = [
        getattr(sk, op)(x, dtype=torch.float64, mask=mask.to(of))
        for of in (torch.float16, torch.float64, torch.float32)
    ]
    expected = getattr(torch, op)(x.double() + mask.double(), -1)
    assert all(torch.equal(each, y[0]) for each in y) and y[0].dtype == torch.float64
    assert (y[0] - expected).abs().max() < 1e-14
    sentence = f"^{op}: dtype must be float32, float16, bfloat16, float64 or None; got torch.int32"
    with pytest.raises(ValueError, match=sentence):
        getattr(sk, op)(x, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{op}: mask must be bool, .*; got torch.bfloat16"):
        getattr(sk, op)(x, dtype=torch.float64, mask=mask.bfloat16())
    told = sk.explain(getattr(sk, op), x, dtype=torch.float64, backend="torch")
    assert told.startswith(f"{op} runs on torch")


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_small_plain_calls_are_left_to_aten(op, monkeypatch):
    cpu = pytest.importorskip(f"slimkernels.backends.cpu.{op}")
    for number, name in enumerate(("MIN_SCALED", "MIN_PLAIN", "MIN_COLUMNS")):
        monkeypatch.setattr(cpu, name, 100 + number)
    x, function = torch.randn(9, 11), getattr(sk, op)
    assert torch.equal(function(x), getattr(torch, op)(x, -1))
    for number, options in enumerate(({"scale": 0.5}, {}, {"dim": 0})):
        match = f"ATen's {op} is faster below {100 + number} elements .*, and input has 99"
        with pytest.raises(sk.BackendError, match=match):
            function(x, **options, backend="cpu")
        large = torch.randn(10, 11)
        assert sk.explain(function, large, **options).startswith(f"{op} runs on cpu")
    for options in ({"is_causal": True}, {"mask": x > 0}):
        assert sk.explain(function, x, **options).startswith(f"{op} runs on cpu")


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_short_plain_rows_and_narrow_columns_are_left_to_aten(op, monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.softmax")
    function = getattr(sk, op)
    bounds = {"MIN_ROW": 3, "MIN_VECTOR_ROW": 20, "MIN_SCALED_ROW": 18, "MIN_INNER": 3}
    for name, value in {**bounds, "MIN_BLOCK": 32, "_ATEN_VECTOR": 64}.items():
        monkeypatch.setattr(cpu, name, value)
    cases = [
        *(((9, N), {}, N in (2, 16, 19)) for N in (2, 3, 15, 16, 19, 20)),
        *(((9, N), {"scale": 0.5}, N in (2, 17)) for N in (2, 17, 18)),
        *((s, {"dim": 1}, s != (2, 8, 4)) for s in ((2, 50, 2), (2, 7, 4), (2, 8, 4))),
        *((s, {"mask": torch.tensor(True)}, False) for s in ((9, 2), (9, 16))),
    ]
    for shape, options, refused in cases:
        told = sk.explain(function, torch.randn(shape), **options)
        assert told.startswith(f"{op} runs on {'torch' if refused else 'cpu'}"), (shape, options)
        assert (f"ATen's {op} is faster" in told) == refused
    assert sk.explain(function, torch.randn(9, 16).bfloat16()).startswith(f"{op} runs on cpu")


def test_low_columns_of_log_softmax_are_left_to_aten(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.log_softmax")
    monkeypatch.setattr(cpu, "MIN_HEIGHT", 8)
    x = torch.randn(7, 50)
    with pytest.raises(sk.BackendError, match="ATen's log_softmax is faster over columns of 7"):
        sk.log_softmax(x, 0, backend="cpu")
    assert sk.explain(sk.log_softmax, torch.randn(8, 50), 0).startswith("log_softmax runs on cpu")
    assert sk.explain(sk.log_softmax, x, 0, mask=x > 0).startswith("log_softmax runs on cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_backend_keeps_the_dtype_under_autocast(dtype):
    x = torch.randn(9, 40).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual = sk.softmax(x, backend="torch")
    eager, truth = (softmax_reference(t) for t in (x, x.double()))
    assert_no_worse(actual, eager, truth)


@pytest.mark.parametrize("wrong", [float("nan"), 2 + 1e-13])
def test_more_than_rounding_is_told(wrong):
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_rounding_alone(right, right + 1e-16, terms=2)
    with pytest.raises(AssertionError):
        assert_rounding_alone(right, right.clone().fill_(wrong), terms=2)
    with pytest.raises(AssertionError):
        assert_rounding_alone(torch.stack([right[0], right[0] - 1 + wrong]), right, terms=2)
