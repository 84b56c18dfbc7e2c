"""LayerNorm of residual + row_scale * dropout(x) in CUDA C++: csrc/cuda/layer_norm.cu."""

from slimkernels.backends.cuda import _norm
from slimkernels.backends.cuda._common import _cuda


def unsupported(x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered):
    return _norm.unsupported_norm(x)


def forward(x, residual, weight, bias, eps, dropout_p, row_scale, zero_centered, seed):
    options = dict(residual=residual, dropout_p=dropout_p, row_scale=row_scale, seed=seed)
    kernel = _cuda.layer_norm_forward
    return _norm.forward(kernel, x, weight, bias, eps, zero_centered, **options)


def backward(
    dy,
    dsum,
    total,
    weight,
    bias,
    mean,
    rstd,
    dropout_p,
    row_scale,
    zero_centered,
    seed,
    is_plain_sum,
):
    options = dict(dsum=dsum, dropout_p=dropout_p, row_scale=row_scale, seed=seed)
    return _norm.backward(
        *(_cuda.layer_norm_backward, dy, total, weight, bias, mean, rstd, zero_centered),
        **options,
        is_plain_sum=is_plain_sum,
    )
