"""RMSNorm of residual + row_scale * dropout(x) in CUDA C++: csrc/cuda/rms_norm.cu."""

from slimkernels.backends.cuda import _norm
from slimkernels.backends.cuda._common import _cuda


def unsupported(x, residual, weight, eps, dropout_p, row_scale, zero_centered):
    return _norm.unsupported_norm(x)


def forward(x, residual, weight, eps, dropout_p, row_scale, zero_centered, seed):
    options = dict(residual=residual, dropout_p=dropout_p, row_scale=row_scale, seed=seed)
    y, total, _, rstd = _norm.forward(
        *(_cuda.rms_norm_forward, x, weight, None, eps, zero_centered), has_mean=False, **options
    )
    return y, total, rstd


def backward(
    dy, dsum, total, weight, rstd, dropout_p, row_scale, zero_centered, seed, is_plain_sum
):
    options = dict(dsum=dsum, dropout_p=dropout_p, row_scale=row_scale, seed=seed)
    dx, dresidual, dweight, _ = _norm.backward(
        *(_cuda.rms_norm_backward, dy, total, weight, None, None, rstd, zero_centered),
        **options,
        is_plain_sum=is_plain_sum,
    )
    return dx, dresidual, dweight
