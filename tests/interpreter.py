"""Make Triton's CPU interpreter (TRITON_INTERPRET=1) trustworthy enough for tests.

Import BEFORE any kernel module, with TRITON_INTERPRET=1 already in the environment.
Works with triton 3.6.0 and 3.9.0 (checked), numpy 1.26 .. 2.4.

Stock interpreter faults it repairs (all silent unless said otherwise):
  * numpy >= 2.4 and triton 3.6: `range(0, K, BK)` on a run-time K raises TypeError
  * bf16 tensors are held as uint16 bit patterns and *arithmetic runs on the bit patterns*:
    tl.dot, +, -, *, /, >, fma, tl.sum, tl.argmax, int->bf16 are garbage
  * fp32 -> bf16 truncates (the GPU rounds to nearest even); 1.5 * bf16 raises; bf16 atomics raise
Checks it adds (env SLIM_INTERP_CHECK=0 turns them off):
  * every load/store/atomic address must lie inside a tensor that was passed to the launch
  * SLIM_INTERP_RACES=1: two programs storing to one address, or one reading what another stored
"""

import os, ctypes
import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as I

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before importing triton"
B = I.InterpreterBuilder
TH = I.TensorHandle
BF16, F32 = tl.bfloat16, tl.float32


def bf16_to_f32(u16):
    return (np.ascontiguousarray(u16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x, rtz=False):
    x = np.ascontiguousarray(x, dtype=np.float32)
    u = x.view(np.uint32)
    if rtz:
        r = u >> np.uint32(16)
    else:
        with np.errstate(over="ignore"):
            r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    r = np.where(np.isnan(x), np.uint32(0x7FC0), r)
    return r.astype(np.uint16)


def _is_bf16(h):
    return isinstance(h, TH) and not isinstance(h.dtype, tl.pointer_type) and h.dtype.scalar == BF16


def _up(h):
    return TH(bf16_to_f32(h.data), F32) if _is_bf16(h) and h.data.dtype == np.uint16 else h


def _down(h):
    if isinstance(h, TH) and h.data.dtype.kind == "f":
        return TH(f32_to_bf16(h.data), BF16)
    return h  # comparisons give bools


def _wrap(name, keep=()):
    orig = getattr(B, name)

    def f(self, *args, **kw):
        if any(_is_bf16(a) for a in args):
            return _down(orig(self, *[_up(a) for a in args], **kw))
        return orig(self, *args, **kw)

    f.__name__ = name
    setattr(B, name, f)


for n in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf"):
    if hasattr(B, n):
        _wrap(n)
# lambdas call self.binary_op etc., so wrapping those covers + - * / compare min max exp ...

_orig_dot = B.create_dot


TF32 = os.environ.get("SLIM_INTERP_TF32", "1") != "0"


def _tf32(h):  # keep 10 mantissa bits, round to nearest (ties away), as cvt.rna.tf32 does
    u = np.ascontiguousarray(h.data).view(np.uint32)
    with np.errstate(over="ignore"):
        u = np.where(
            (u & 0x7F800000) == 0x7F800000, u, (u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        )
    return TH(u.astype(np.uint32).view(np.float32), F32)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    if (
        TF32
        and a.dtype.scalar == F32
        and b.dtype.scalar == F32
        and input_precision == I._ir.INPUT_PRECISION.TF32
    ):
        a, b = (
            _tf32(a),
            _tf32(b),
        )  # the GPU's default for fp32 operands; input_precision="ieee" to avoid it
    return _orig_dot(self, _up(a), _up(b), d, input_precision, max_num_imprecise_acc)


B.create_dot = create_dot
_orig_cast = B.cast_impl


def cast_impl(self, src, dst_type):
    s, d = src.dtype.scalar, dst_type.scalar
    if s == d:
        return src
    if s == BF16:
        f = TH(bf16_to_f32(src.data), F32)
        return f if d == F32 else _orig_cast(self, f, dst_type)
    if d == BF16:
        return TH(f32_to_bf16(src.data.astype(np.float32)), BF16)
    return _orig_cast(self, src, dst_type)


B.cast_impl = cast_impl
_orig_fp2fp = B.create_fp_to_fp


def create_fp_to_fp(self, src, dst_type, rounding_mode):
    s, d = src.dtype.scalar, dst_type.scalar
    rtz = rounding_mode is not None and rounding_mode == I._ir.ROUNDING_MODE.RTZ
    if d == BF16 and s in (F32, tl.float64, tl.float16):
        return TH(f32_to_bf16(src.data.astype(np.float32), rtz), BF16)
    if s == BF16 and d == F32:
        return TH(bf16_to_f32(src.data), F32)
    return _orig_fp2fp(self, src, dst_type, rounding_mode)


B.create_fp_to_fp = create_fp_to_fp
if not hasattr(B, "get_bf16"):
    B.get_bf16 = lambda self, v: TH(f32_to_bf16(np.array([v], np.float32)), BF16)


def _fix_reduce(cls, names):
    for n in names:
        if not hasattr(cls, n):
            continue
        orig = getattr(cls, n)

        def f(self, input, *a, _orig=orig, **k):
            t = input[0] if isinstance(input, tuple) else input
            if t.dtype == BF16:
                up = tl.core.tensor(
                    TH(bf16_to_f32(t.handle.data), F32), tl.block_type(F32, list(t.shape))
                )
                rs = _orig(self, up, *a, **k)
                conv = lambda r: (
                    tl.core.tensor(
                        TH(f32_to_bf16(r.handle.data), BF16),
                        tl.block_type(BF16, list(r.shape)) if r.type.is_block() else BF16,
                    )
                    if r.dtype == F32
                    else r
                )
                return type(rs)(conv(r) for r in rs) if isinstance(rs, (list, tuple)) else conv(rs)
            return _orig(self, input, *a, **k)

        setattr(cls, n, f)


_fix_reduce(I.ReduceOps, ("sum", "min_max"))
_fix_reduce(I.ScanOps, ("cumsum", "cumprod"))

# ---- numpy >= 2.4: int(array of shape (1,)) raises ----
_orig_patch_tensor = I._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    _orig_patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(())))


I._patch_lang_tensor = _patch_lang_tensor

# ---- bf16 atomics (the C++ helper has no bf16) ----
_orig_rmw = B.create_atomic_rmw


def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
    _check(ptr.data, mask.data, ptr, "atomic")
    if not _is_bf16(val):
        return _orig_rmw(self, op, ptr, val, mask, sem, scope)
    assert op == I._ir.ATOMIC_OP.FADD, "bf16: only atomic_add"
    p, v, m = [
        np.broadcast_to(x, ptr.data.shape).ravel()
        for x in (ptr.data, bf16_to_f32(val.data), mask.data)
    ]
    old = np.zeros(p.shape, np.uint16)
    for i in range(p.size):
        if m[i]:
            c = ctypes.c_uint16.from_address(int(p[i]))
            old[i] = c.value
            c.value = int(f32_to_bf16(bf16_to_f32(np.array([c.value], np.uint16)) + v[i])[0])
    return TH(old.reshape(ptr.data.shape), BF16)


B.create_atomic_rmw = create_atomic_rmw

# ---- address and race checks ----
CHECK = os.environ.get("SLIM_INTERP_CHECK", "1") != "0"
RACES = os.environ.get("SLIM_INTERP_RACES", "0") == "1"
_ranges, _shadow = [], {}
_starts = _ends = None


def _check(ptrs, mask, handle, what):
    global _starts, _ends
    if not CHECK or not _ranges:
        return
    if _starts is None:
        r = []
        for s, e in sorted(_ranges):  # merge overlapping arguments
            if r and s < r[-1][1]:
                r[-1] = (r[-1][0], max(e, r[-1][1]))
            else:
                r.append((s, e))
        _starts, _ends = (
            np.array([a for a, _ in r], np.uint64),
            np.array([b for _, b in r], np.uint64),
        )
    size = max(1, handle.get_element_ty().primitive_bitwidth // 8)
    p = (
        ptrs[mask]
        if mask is not None and mask.shape == ptrs.shape
        else (
            ptrs.ravel() if mask is None or mask.all() else ptrs[np.broadcast_to(mask, ptrs.shape)]
        )
    )
    if p.size == 0:
        return
    k = np.searchsorted(_starts, p, side="right").astype(np.int64) - 1
    bad = (k < 0) | (p + np.uint64(size) > _ends[np.maximum(k, 0)])
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        a = int(p[i])
        near = min(((abs(a - s), s, e) for s, e in zip(_starts.tolist(), _ends.tolist())))
        raise IndexError(
            f"{what}: {int(bad.sum())} of {p.size} addresses are outside every tensor argument; the first is "
            f"{a - near[1]} bytes from the start of the nearest one (of {near[2] - near[1]} bytes), "
            f"program {I.interpreter_builder.grid_idx}"
        )
    if RACES and what != "atomic":
        me = hash(I.interpreter_builder.grid_idx) & 0x7FFFFFFF | 1
        for j in np.unique(k):
            s, e = int(_starts[j]), int(_ends[j])
            sh = _shadow.setdefault(s, np.zeros(e - s, np.int64))
            q = (p[k == j] - np.uint64(s)).astype(np.int64)
            w = sh[q]
            if ((w != 0) & (w != me)).any():
                raise RuntimeError(
                    f"race: program {I.interpreter_builder.grid_idx} does a {what} of what another program stored"
                )
            if what == "store":
                sh[q] = me


_ol, _os = B.create_masked_load, B.create_masked_store


def create_masked_load(self, ptrs, mask, other, *a, **k):
    _check(ptrs.data, mask.data, ptrs, "load")
    return _ol(self, ptrs, mask, other, *a, **k)


def create_masked_store(self, ptrs, value, mask, *a, **k):
    _check(ptrs.data, mask.data, ptrs, "store")
    return _os(self, ptrs, value, mask, *a, **k)


B.create_masked_load, B.create_masked_store = create_masked_load, create_masked_store
_oc = I._implicit_cvt


def _implicit_cvt(arg):
    if isinstance(arg, bool):  # triton 3.6: a run-time bool argument raised
        return tl.tensor(TH(np.array([arg], dtype=bool), tl.int1), tl.int1)
    if hasattr(arg, "data_ptr") and not isinstance(arg, I.TensorDescriptor):
        t = I._unwrap_tensor(arg)
        # the tensor's own extent, not its storage's: a slice passed alone must not be over-run
        n = (
            0
            if t.numel() == 0
            else (1 + sum((s - 1) * abs(st) for s, st in zip(t.shape, t.stride())))
            * t.element_size()
        )
        _ranges.append((t.data_ptr(), t.data_ptr() + n))
    return _oc(arg)


I._implicit_cvt = _implicit_cvt
_og = I.GridExecutor.__call__


def _grid_call(self, *a, **k):
    global _starts, _ends
    saved = list(_ranges), dict(_shadow)
    _ranges.clear()
    _shadow.clear()
    _starts = _ends = None
    try:
        return _og(self, *a, **k)
    finally:
        _ranges[:] = saved[0]
        _shadow.clear()
        _shadow.update(saved[1])
        _starts = _ends = None


I.GridExecutor.__call__ = _grid_call
