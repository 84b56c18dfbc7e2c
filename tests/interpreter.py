"""Repairs and checks for Triton's CPU interpreter, so that kernels can be tested without a GPU.

Import it before any kernel module, with TRITON_INTERPRET=1 already in the environment. It patches
private names of Triton 3.6 to 3.9 (numpy 1.26 to 2.4): test_interpreter.py says when that breaks.

What it repairs, all silent in the stock interpreter unless said otherwise:
  - bfloat16 lives in uint16 bit patterns and arithmetic runs on the patterns: tl.dot, + - * / >,
    fma, tl.sum, tl.argmax and int -> bfloat16 are garbage
  - float32 -> bfloat16 truncates, where the GPU rounds to nearest even
  - tl.fma rounds its product, and the bits of float32 tl.dot depend on the operands' shapes
  - `scalar * bfloat16`, bfloat16 atomics, run-time bools (3.6) and, from numpy 2.4, `range()` over
    a run-time bound (3.6) raise
What it adds, with the environment variable that turns it off or on:
  - SLIM_INTERP_TF32=0   off: float32 tl.dot rounds its operands to TF32 unless
                         input_precision="ieee", as the GPU does
  - SLIM_INTERP_CHECK=0  off: every address must lie inside a tensor that the launch was given
  - SLIM_INTERP_RACES=1  on: no program stores to, or reads, what another program stored
Pointers that kernels load from memory may point into the tensors that the list
`reachable` refers to.
Not covered: fp8.
"""

import ctypes
import os

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock

if not triton.knobs.runtime.interpret:
    raise RuntimeError("set TRITON_INTERPRET=1 before triton is imported")

EMULATE_TF32 = os.environ.get("SLIM_INTERP_TF32", "1") != "0"
CHECK_ADDRESSES = os.environ.get("SLIM_INTERP_CHECK", "1") != "0"
CHECK_RACES = os.environ.get("SLIM_INTERP_RACES", "0") == "1"

Builder = stock.InterpreterBuilder
Handle = stock.TensorHandle


# Conversion between bfloat16 bit patterns and float32


def float32_of(bits: np.ndarray) -> np.ndarray:
    wide = np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def bfloat16_bits(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    if not toward_zero:
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        with np.errstate(over="ignore"):
            bits = bits + np.uint32(0x7FFF) + odd  # nearest, ties to even
    high = bits >> np.uint32(16)
    # Rounding a NaN's payload could carry into infinity.
    return np.where(np.isnan(values), np.uint32(0x7FC0), high).astype(np.uint16)


def tf32(values: np.ndarray) -> np.ndarray:
    """The 10 mantissa bits that the tensor cores read: nearest, ties away, as cvt.rna.tf32."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    not_finite = (bits & 0x7F800000) == 0x7F800000
    return np.where(not_finite, bits, rounded).astype(np.uint32).view(np.float32)


def is_bfloat16(value) -> bool:
    if not isinstance(value, Handle) or isinstance(value.dtype, tl.pointer_type):
        return False
    return value.dtype.scalar == tl.bfloat16


def widen(value):
    if is_bfloat16(value) and value.data.dtype == np.uint16:
        return Handle(float32_of(value.data), tl.float32)
    return value


def narrow(value):
    if isinstance(value, Handle) and value.data.dtype.kind == "f":
        return Handle(bfloat16_bits(value.data), tl.bfloat16)
    return value  # comparisons give bools


# Arithmetic: bfloat16 is computed in float32 and rounded once, as the GPU does


def _computed_in_float32(original):
    def computed(self, *args, **kwargs):
        if not any(is_bfloat16(arg) for arg in args):
            return original(self, *args, **kwargs)
        return narrow(original(self, *(widen(arg) for arg in args), **kwargs))

    return computed


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z in float32, rounded once: float64 holds the product of two float32 exactly."""
    return (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)


_stock_fma = Builder.create_fma


def _create_fma(self, x, y, z):
    if x.dtype.scalar != tl.float32:
        return _stock_fma(self, x, y, z)
    return Handle(fma(x.data, y.data, z.data), tl.float32)


Builder.create_fma = _create_fma

# The builder's + - * / comparisons, min, max, exp... all go through binary_op and unary_op.
for _name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf"):
    if hasattr(Builder, _name):
        setattr(Builder, _name, _computed_in_float32(getattr(Builder, _name)))

_stock_dot = Builder.create_dot


def _create_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc):
    float32_operands = a.dtype.scalar == b.dtype.scalar == tl.float32
    default_precision = input_precision == stock._ir.INPUT_PRECISION.TF32
    if EMULATE_TF32 and float32_operands and default_precision:
        a, b = (Handle(tf32(operand.data), tl.float32) for operand in (a, b))
    elif float32_operands and a.data.ndim == 2:
        # Without tensor cores it is a chain over k: the transposed product has the same bits,
        # which numpy's has not.
        total = accumulator.data
        for k in range(a.data.shape[1]):
            total = fma(a.data[:, k : k + 1], b.data[k : k + 1], total)
        return Handle(total, tl.float32)
    a, b = widen(a), widen(b)
    return _stock_dot(self, a, b, accumulator, input_precision, max_num_imprecise_acc)


Builder.create_dot = _create_dot


# Casts

_stock_cast = Builder.cast_impl
_stock_fp_to_fp = Builder.create_fp_to_fp


def _cast(self, source, dtype):
    if source.dtype.scalar == dtype.scalar:
        return source
    if source.dtype.scalar == tl.bfloat16:
        wide = Handle(float32_of(source.data), tl.float32)
        return wide if dtype.scalar == tl.float32 else _stock_cast(self, wide, dtype)
    if dtype.scalar == tl.bfloat16:
        return Handle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
    return _stock_cast(self, source, dtype)


def _create_fp_to_fp(self, source, dtype, rounding_mode):
    scalar = source.dtype.scalar
    if dtype.scalar == tl.bfloat16 and scalar in (tl.float16, tl.float32, tl.float64):
        toward_zero = rounding_mode == stock._ir.ROUNDING_MODE.RTZ
        return Handle(bfloat16_bits(source.data.astype(np.float32), toward_zero), tl.bfloat16)
    if scalar == tl.bfloat16 and dtype.scalar == tl.float32:
        return Handle(float32_of(source.data), tl.float32)
    return _stock_fp_to_fp(self, source, dtype, rounding_mode)


Builder.cast_impl = _cast
Builder.create_fp_to_fp = _create_fp_to_fp
if not hasattr(Builder, "get_bf16"):
    Builder.get_bf16 = lambda self, value: Handle(
        bfloat16_bits(np.array([value], np.float32)), tl.bfloat16
    )


# Reductions and scans


def _narrow_result(result):
    if result.dtype != tl.float32:
        return result  # an index of argmax
    shape = list(result.shape)
    kind = tl.block_type(tl.bfloat16, shape) if result.type.is_block() else tl.bfloat16
    return tl.core.tensor(Handle(bfloat16_bits(result.handle.data), tl.bfloat16), kind)


def _reduced_in_float32(original):
    def reduced(self, operand, *args, **kwargs):
        first = operand[0] if isinstance(operand, tuple) else operand
        if first.dtype != tl.bfloat16:
            return original(self, operand, *args, **kwargs)
        handle = Handle(float32_of(first.handle.data), tl.float32)
        wide = tl.core.tensor(handle, tl.block_type(tl.float32, list(first.shape)))
        results = original(self, wide, *args, **kwargs)
        if isinstance(results, list | tuple):
            return type(results)(_narrow_result(result) for result in results)
        return _narrow_result(results)

    return reduced


for _ops, _names in ((stock.ReduceOps, ("sum", "min_max")), (stock.ScanOps, ("cumsum", "cumprod"))):
    for _name in _names:
        if hasattr(_ops, _name):
            setattr(_ops, _name, _reduced_in_float32(getattr(_ops, _name)))


# Arguments: numpy 2.4 refuses int() of a one-element array, Triton 3.6 a bool

_stock_patch_tensor = stock._patch_lang_tensor
_stock_implicit_convert = stock._implicit_cvt


def _patch_tensor(tensor, scope):
    _stock_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(())))


def _implicit_convert(argument):
    if isinstance(argument, bool):
        return tl.tensor(Handle(np.array([argument], dtype=bool), tl.int1), tl.int1)
    if hasattr(argument, "data_ptr") and not isinstance(argument, stock.TensorDescriptor):
        _launch.allow(stock._unwrap_tensor(argument))
    return _stock_implicit_convert(argument)


stock._patch_lang_tensor = _patch_tensor
stock._implicit_cvt = _implicit_convert


# Addresses: what each launch may touch, and which program stored where


# Weak references to tensors whose addresses lie in the memory that launches are given.
reachable: list = []


class Launch:
    """The memory that one launch was given, and who wrote it."""

    def __init__(self):
        self.ranges: list[tuple[int, int]] = []  # [start, end) of each tensor argument
        self.merged: tuple[np.ndarray, np.ndarray] | None = None
        self.owners: dict[int, np.ndarray] = {}  # a byte's storing program, counted from 1
        for reference in reachable:
            if (tensor := reference()) is not None:
                self.allow(tensor)

    def allow(self, tensor) -> None:
        # The tensor's own extent, not its storage's: a slice must not be overrun either.
        last = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size() if tensor.numel() else 0
        self.ranges.append((tensor.data_ptr(), tensor.data_ptr() + size))

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the allowed memory, overlapping arguments merged."""
        if self.merged is None:
            spans: list[list[int]] = []
            for start, end in sorted(self.ranges):
                if spans and start < spans[-1][1]:
                    spans[-1][1] = max(end, spans[-1][1])
                else:
                    spans.append([start, end])
            starts, ends = zip(*spans, strict=True)
            self.merged = np.array(starts, np.uint64), np.array(ends, np.uint64)
        return self.merged

    def check(self, pointers: Handle, mask: np.ndarray, what: str) -> None:
        if not CHECK_ADDRESSES or not self.ranges:
            return
        starts, ends = self.bounds()
        addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)]
        if addresses.size == 0:
            return
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        span = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        outside = (span < 0) | (addresses + size > ends[np.maximum(span, 0)])
        if outside.any():
            self.report(what, addresses, outside)
        if CHECK_RACES and what != "atomic":
            self.claim(what, addresses, span)

    def report(self, what: str, addresses: np.ndarray, outside: np.ndarray) -> None:
        first = int(addresses[np.flatnonzero(outside)[0]])
        spans = zip(*(bound.tolist() for bound in self.bounds()), strict=True)
        start, end = min(spans, key=lambda span: abs(first - span[0]))
        raise IndexError(
            f"{what}: {int(outside.sum())} of {addresses.size} addresses are outside every tensor "
            f"argument; the first is {first - start} bytes from the start of the nearest one (of "
            f"{end - start} bytes), program {stock.interpreter_builder.grid_idx}"
        )

    def claim(self, what: str, addresses: np.ndarray, span: np.ndarray) -> None:
        x, y, z = stock.interpreter_builder.grid_idx
        columns, rows, _ = stock.interpreter_builder.grid_dim
        program = 1 + x + columns * (y + rows * z)
        starts, ends = self.bounds()
        for i in np.unique(span):
            start, end = int(starts[i]), int(ends[i])
            owner = self.owners.setdefault(start, np.zeros(end - start, np.int64))
            at = (addresses[span == i] - np.uint64(start)).astype(np.int64)
            if ((owner[at] != 0) & (owner[at] != program)).any():
                raise RuntimeError(
                    f"race: program {(x, y, z)} does a {what} of what another program stored"
                )
            if what == "store":
                owner[at] = program


_launch = Launch()
_stock_load, _stock_store = Builder.create_masked_load, Builder.create_masked_store
_stock_atomic = Builder.create_atomic_rmw
_stock_grid_call = stock.GridExecutor.__call__


def _create_masked_load(self, pointers, mask, *args, **kwargs):
    _launch.check(pointers, mask.data, "load")
    return _stock_load(self, pointers, mask, *args, **kwargs)


def _create_masked_store(self, pointers, value, mask, *args, **kwargs):
    _launch.check(pointers, mask.data, "store")
    return _stock_store(self, pointers, value, mask, *args, **kwargs)


def _create_atomic_rmw(self, op, pointers, value, mask, sem, scope):
    _launch.check(pointers, mask.data, "atomic")
    if not is_bfloat16(value):
        return _stock_atomic(self, op, pointers, value, mask, sem, scope)
    if op != stock._ir.ATOMIC_OP.FADD:
        raise NotImplementedError("of the bfloat16 atomics, only atomic_add")
    shape = pointers.data.shape
    addresses, values, wanted = (
        np.broadcast_to(array, shape).ravel()
        for array in (pointers.data, float32_of(value.data), mask.data)
    )
    before = np.zeros(addresses.shape, np.uint16)
    for i in np.flatnonzero(wanted):
        cell = ctypes.c_uint16.from_address(int(addresses[i]))
        before[i] = cell.value
        total = float32_of(np.array([cell.value], np.uint16)) + values[i]
        cell.value = int(bfloat16_bits(total)[0])
    return Handle(before.reshape(shape), tl.bfloat16)


def _grid_call(self, *args, **kwargs):
    global _launch
    outer, _launch = _launch, Launch()
    try:
        with np.errstate(all="ignore"):  # a GPU does not warn of infinities
            return _stock_grid_call(self, *args, **kwargs)
    finally:
        _launch = outer


Builder.create_masked_load = _create_masked_load
Builder.create_masked_store = _create_masked_store
Builder.create_atomic_rmw = _create_atomic_rmw
stock.GridExecutor.__call__ = _grid_call
