"""Softmax in Triton: the kernels are in _softmax.py and _softmax_columns.py."""

import torch

from slimkernels.backends._mask import MaskRows
from slimkernels.backends.triton import _softmax, _softmax_columns
from slimkernels.backends.triton._common import unsupported_tensor, warps_of
from slimkernels.backends.triton._softmax import BLOCK, MAX_TILE, TILE, Dropout, Sinks


def unsupported(x, dim, scale, mask, is_causal, sinks, dropout_p):
    return unsupported_tensor(x) or _softmax.unsupported_row(x, dim)


def forward(x, dim, scale, mask, is_causal, sinks, dropout_p, seed):
    if dim == -1:
        return _softmax.softmax_of(x, scale, mask, is_causal, sinks, dropout_p, seed)
    y, kept = _softmax_columns.columns_softmax_of(x, scale, mask, dropout_p, seed)
    return y, kept, x.new_empty(0, dtype=torch.float32)


def backward(dy, y, shares, dim, scale, dropout_p, seed):
    if dim == -1:
        return _softmax.gradients_of(dy, y, scale, shares, dropout_p, seed)
    dx = _softmax_columns.columns_gradient_of(dy, y, scale, dropout_p, seed)
    return dx, y.new_empty(0, dtype=torch.float32)


# What tests/test_aot.py compiles for sm_80, sm_90 and sm_100, and the most that may come out.
_TYPES = {
    **dict.fromkeys(("x_ptr", "y_ptr", "dy_ptr", "dx_ptr"), "*bf16"),
    **dict.fromkeys(("shares_ptr", "products_ptr"), "*fp32"),
    **{"seed_ptr": "*i64", "scale": "fp32", "factor": "fp32", "threshold": "i32/1"},
    **dict.fromkeys(("M", "N", "inner", "period"), "i32"),
    "mask": MaskRows("*bf16", *("i32",) * 5, 1),
    "sinks": Sinks("*bf16", "*fp32", "i32", "i32"),
    "dropout": Dropout("*i64", "*bf16", "fp32"),
}
_OPTIONAL = (
    *("mask", "sinks", "dropout", "period"),
    *("shares_ptr", "products_ptr", "seed_ptr"),
)


def _declared(kernel, absent, log, tile, warps, registers):
    constexprs = {name: None for name in absent if name in kernel.arg_names}
    constexprs |= {n: v for n, v in (("LOG", log), ("HIDES", log)) if n in kernel.arg_names}
    types = {n: t for n, t in _TYPES.items() if n in kernel.arg_names and n not in constexprs}
    return dict(
        kernel=kernel,
        signature=types,
        constexprs=constexprs | tile,
        num_warps=warps,
        registers=registers,
    )


_ROWS = _softmax._forward_kernel, _softmax._backward_kernel
_LONG_ROWS = _softmax._forward_long_kernel, _softmax._backward_long_kernel
_COLUMNS = _softmax_columns._forward_kernel, _softmax_columns._backward_kernel
_LONGEST = (_ROWS, {"BLOCK_M": 1, "BLOCK_N": MAX_TILE}, 16, 104)
_TILES = (
    (_ROWS, {"BLOCK_M": 4, "BLOCK_N": TILE // 4}, warps_of(TILE), 104),
    _LONGEST,
    (_LONG_ROWS, {"BLOCK_N": BLOCK}, warps_of(BLOCK), 104),
    (_COLUMNS, {"BLOCK_N": 32, "BLOCK_I": 64}, 4, 104),
)
COMPILES = [
    *(_declared(kernel, (), False, *tile) for kernels, *tile in _TILES for kernel in kernels),
    *(_declared(kernels[0], _OPTIONAL, False, *tile) for kernels, *tile in _TILES[:2]),
]
# As log_softmax calls them.
LOG_COMPILES = [
    _declared(kernel, ("sinks", "dropout", *_OPTIONAL[4:]), True, *tile)
    for kernels, *tile in (_LONGEST, _TILES[3])
    for kernel in kernels
]
