"""The repaired interpreter computes what torch computes, and its checks find what they look for."""

import os

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is present, so kernels are compiled", allow_module_level=True)

import interpreter

N = 64


@triton.jit
def _binary_kernel(x_ptr, y_ptr, z_ptr, OP: tl.constexpr, N: tl.constexpr):
    cols = tl.arange(0, N)
    x, y = tl.load(x_ptr + cols), tl.load(y_ptr + cols)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "where":
        z = tl.where(x > y, x, y)
    elif OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "scalar":
        z = 2.5 * x
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "from_int":
        z = cols.to(tl.bfloat16)
    elif OP == "to_float16":
        z = x.to(tl.float16)
    elif OP == "mixed":
        z = x + y.to(tl.float32)
    elif OP == "zeros":
        z = tl.zeros((N,), tl.bfloat16) + x
    elif OP == "full":
        z = tl.full((N,), 1.5, tl.bfloat16)
    elif OP == "exp":
        z = tl.exp(x.to(tl.float32)).to(tl.bfloat16)
    tl.store(z_ptr + cols, z.to(z_ptr.dtype.element_ty))


EXPECTED = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "max": torch.maximum,
    "where": torch.maximum,
    "neg": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "scalar": lambda x, y: 2.5 * x,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).bfloat16(),
    "from_int": lambda x, y: torch.arange(N).bfloat16(),
    "to_float16": lambda x, y: x.half(),
    "mixed": lambda x, y: x + y.float(),
    "zeros": lambda x, y: x,
    "full": lambda x, y: torch.full((N,), 1.5).bfloat16(),
    "exp": lambda x, y: x.float().exp().bfloat16(),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_bfloat16_elementwise_is_torchs_bit_for_bit(op):
    torch.manual_seed(0)
    x, y = torch.randn(2, N).bfloat16().unbind()
    expected = EXPECTED[op](x, y)
    z = torch.empty_like(expected)
    _binary_kernel[(1,)](x, y, z, OP=op, N=N)
    assert torch.equal(z, expected)


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, N: tl.constexpr):
    cols = tl.arange(0, N)
    x = tl.load(x_ptr + cols)
    if OP == "sum":
        y = tl.sum(x, 0)
    elif OP == "max":
        y = tl.max(x, 0)
    elif OP == "min":
        y = tl.min(x, 0)
    elif OP == "argmax":
        y = tl.argmax(x, 0)
    elif OP == "cumsum":
        y = tl.sum(tl.where(cols == N - 1, tl.cumsum(x, 0), 0.0), 0)
    tl.store(y_ptr, y.to(tl.float32))


@pytest.mark.parametrize("op", ["sum", "max", "min", "argmax", "cumsum"])
def test_bfloat16_reductions(op):
    # Small integers, so that float32 and bfloat16 hold every partial sum exactly.
    x = torch.tensor([(7 * i) % 11 - 5 for i in range(N)]).bfloat16()
    x[17], x[18] = 9, -9
    expected = {"sum": x.sum(), "max": 9, "min": -9, "argmax": 17, "cumsum": x.sum()}[op]
    y = torch.empty(1)
    _reduce_kernel[(1,)](x, y, OP=op, N=N)
    assert y.item() == float(expected)


@triton.jit
def _products_kernel(x_ptr, y_ptr, z_ptr, t_ptr, fused_ptr, M: tl.constexpr, K: tl.constexpr):
    rows, cols = tl.arange(0, M), tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + cols[None, :])
    y = tl.load(y_ptr + cols[:, None] * K + cols[None, :])
    at = rows[:, None] * K + cols[None, :]
    tl.store(z_ptr + at, tl.dot(x, y, input_precision="ieee"))
    tl.store(t_ptr + at, tl.dot(y.T, x.T, input_precision="ieee").T)
    tl.store(fused_ptr + at, tl.fma(x, x, -x * x))


def test_float32_products_round_as_chains_of_fma():
    torch.manual_seed(0)
    x, y = torch.randn(32, 16), torch.randn(16, 16)
    z, transposed, fused = (torch.empty(32, 16) for _ in range(3))
    _products_kernel[(1,)](x, y, z, transposed, fused, M=32, K=16)
    assert torch.equal(z, transposed)
    chain = torch.zeros(32, 16)
    for k in range(16):
        chain = (x[:, k, None].double() * y[None, k].double() + chain).float()
    assert torch.equal(z, chain)
    assert torch.equal(fused, (x.double() * x.double() - (x * x)).float()) and (fused != 0).any()


@triton.jit
def _round_kernel(x_ptr, y_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols).to(tl.bfloat16))


def test_float32_to_bfloat16_rounds_to_nearest_even():
    ties = [1.00390625, 1.01171875, -1.01171875, 1.0078125 - 1e-7]
    edges = [0.99999994, 3.3895e38, 3.4e38, float("inf"), -float("inf"), 1e-40, -0.0, 65504.0]
    not_a_number = [float("nan"), -float("nan"), float("nan"), float("nan")]
    x = torch.tensor(ties + edges + not_a_number)
    x.view(torch.int32)[-1] = 0x7FFFFFFF  # a NaN that rounding would carry out of its exponent
    y = torch.empty(16, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, N=16)
    assert torch.equal(y[:12], x.bfloat16()[:12]) and y[12:].isnan().all()


@triton.jit
def _atomic_kernel(x_ptr, y_ptr, limit, N: tl.constexpr):
    cols = tl.arange(0, N)
    tl.atomic_add(y_ptr + cols // 2, tl.load(x_ptr + cols), mask=cols < limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_atomic_add_sums_collisions_under_the_mask(dtype):
    x = torch.arange(N).to(dtype)
    y = torch.ones(N // 2, dtype=dtype)
    _atomic_kernel[(2,)](x, y, N - 4, N=N)
    expected = 1 + 2 * x.view(-1, 2).sum(1)
    expected[-2:] = 1
    assert torch.equal(y, expected)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, K, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    c = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + rows * K + k + cols)
        b = tl.load(b_ptr + (k + rows) * BLOCK + cols)
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(c_ptr + rows * BLOCK + cols, c)


def matmul(a, b, precision):
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, a.shape[1], PRECISION=precision, BLOCK=16)
    return c


def test_bfloat16_dot_accumulates_in_float32():
    torch.manual_seed(1)
    a, b = torch.randn(16, 48).bfloat16(), torch.randn(48, 16).bfloat16()
    error = (matmul(a, b, "ieee") - a.double() @ b.double()).abs().max()
    assert error < 48 * torch.finfo(torch.float32).eps * 16


def test_float32_dot_is_tf32_unless_ieee(monkeypatch):
    torch.manual_seed(2)
    a, b = torch.randn(16, 48), torch.randn(48, 16)
    truth = a.double() @ b.double()
    exact = (matmul(a, b, "ieee") - truth).abs().max()
    rounded = (matmul(a, b, None) - truth).abs().max()
    # Ten mantissa bits lose 2^-11 of each operand, about a thousand times float32's rounding.
    assert exact < 48 * torch.finfo(torch.float32).eps * 16 < rounded < 48 * 2**-10 * 16
    monkeypatch.setattr(interpreter, "EMULATE_TF32", False)
    assert (matmul(a, b, None) - truth).abs().max() == exact


def test_tf32_keeps_ten_bits_and_what_is_not_finite():
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -(1 + 2**-11), float("inf")]).numpy()
    expected = [1 + 2**-10, 1 + 2**-10, 1, -(1 + 2**-10), float("inf")]
    assert interpreter.tf32(x).tolist() == expected


@triton.jit
def _copy_kernel(x_ptr, y_ptr, limit, offset, N: tl.constexpr):
    cols = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + cols + offset, mask=cols < limit)
    tl.store(y_ptr + cols, x, mask=cols < limit)


def test_every_address_must_lie_in_an_argument(monkeypatch):
    def refused(sentence):
        return pytest.raises(InterpreterError, match=sentence)

    # Slices: what lies beside them belongs to this process, and still must not be touched.
    x, y = torch.zeros(3 * N)[N : 2 * N - 1], torch.zeros(2 * N)[:N]
    _copy_kernel[(1,)](x, y, N - 1, 0, N=N)
    with refused(r"load: 1 of 64 addresses are outside every.* is 252 bytes from the start"):
        _copy_kernel[(1,)](x, y, N, 0, N=N)
    with refused(r"load: 1 of 63 addresses are outside every.* is -4 bytes from the start"):
        _copy_kernel[(1,)](x, y, N - 1, -1, N=N)
    with refused("store: 2 of 63 addresses are outside"):
        _copy_kernel[(1,)](x, y[:-3], N - 1, 0, N=N)
    with refused("atomic: 1 of 63 addresses are outside"):
        _atomic_kernel[(1,)](y, y[: N // 2 - 1].clone(), N - 1, N=N)
    monkeypatch.setattr(interpreter, "CHECK_ADDRESSES", False)
    _copy_kernel[(1,)](x, y, N, 0, N=N)


@triton.jit
def _stride_kernel(x_ptr, y_ptr, step, N: tl.constexpr):
    cols = tl.program_id(0) * step + tl.arange(0, N)
    tl.store(y_ptr + cols, tl.load(x_ptr + cols))


def test_races_between_programs(monkeypatch):
    monkeypatch.setattr(interpreter, "CHECK_RACES", True)
    x, y = torch.zeros(4 * N), torch.zeros(4 * N)
    _stride_kernel[(4,)](x, y, N, N=N)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) does a store of what another"):
        _stride_kernel[(4,)](x, y, N - 1, N=N)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) does a load of what another"):
        _stride_kernel[(4,)](x, x, N - 1, N=N)
    monkeypatch.setattr(interpreter, "CHECK_RACES", False)
    _stride_kernel[(4,)](x, y, N - 1, N=N)


@triton.jit
def _bool_kernel(y_ptr, wanted):
    tl.store(y_ptr, tl.where(wanted, 1.0, 2.0))


@pytest.mark.parametrize("wanted", [True, False])
def test_runtime_bool(wanted):
    y = torch.empty(1)
    _bool_kernel[(1,)](y, wanted)
    assert y.item() == (1.0 if wanted else 2.0)
