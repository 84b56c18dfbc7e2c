"""What gelu, silu and relu_squared run in CUDA C++: csrc/cuda/activation.cuh."""

import torch

from slimkernels.backends.cuda._common import DTYPES, _cuda, launch_place

# Mirrors enum Curve in csrc/cuda/ops.h.
CURVES = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu_squared": 3}


def forward(x, bias, curve):
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _cuda.activation_forward(
            *(x.data_ptr(), _address(bias), y.data_ptr()), *_how(x, bias, curve)
        )
    return y


def backward(dy, x, bias, curve):
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    shares, partials = 1, None
    if bias is not None:
        bias = bias.contiguous()
        shares = _shares(x)
        partials = x.new_empty((shares, bias.numel()), dtype=torch.float32)
    if x.numel():
        _cuda.activation_backward(
            *(dy.data_ptr(), x.data_ptr(), _address(bias), dx.data_ptr(), _address(partials)),
            *(shares, *_how(x, bias, curve)),
        )
    if bias is None:
        return dx, x.new_empty(0)
    if not x.numel():
        partials.zero_()
    return dx, partials.sum(0).to(bias.dtype)


def _shares(x):
    """Into how many parts the rows go whose dbias are added up: eight blocks a multiprocessor."""
    N = x.shape[-1]
    M = x.numel() // max(N, 1)
    blocks = 8 * multiprocessors(x)  # of 256 columns and 8 rows at once
    return max(1, min(triton_cdiv(M, 8), blocks * 256 // max(N, 1)))


def _how(x, bias, curve):
    """The sizes, without a bias those of one long row, and what both kernels take after them."""
    N = x.numel() if bias is None else bias.numel()
    bias_dtype = DTYPES[x.dtype if bias is None else bias.dtype]
    return x.numel() // N, N, CURVES[curve], DTYPES[x.dtype], bias_dtype, *launch_place(x)


def _address(x):
    return 0 if x is None else x.data_ptr()
