"""Rows looked up, their sum, LayerNorm and dropout on the CPU: csrc/cpu/embedding.cpp."""

from array import array

import torch

from slimkernels.backends._dropout import threshold
from slimkernels.backends._embedding import widest
from slimkernels.backends.cpu._common import (
    DTYPES,
    _cpu,
    address,
    as_dtype,
    as_wanted,
    empty_gradient,
    norm_parameters,
    pointers,
    run,
    unsupported_size,
    unsupported_tensor,
)

# Elements below which eager's lookups and ATen's norm are the faster where nothing is dropped out.
# Their time over ours, forward and with backward, of a normalised sum of three parts, float32 and
# bfloat16, an Intel Xeon with AMX, one busy thread: 0.54 to 0.70 at 128x128, 0.77 to 1.17 at
# 256x256, 1.9 to 3.0 at 341x768; of the sum alone 0.33 to 0.59, 0.56 to 0.78 and 1.1 to 2.0. From
# 256x256 on, the backend torch, which checks its arguments too, is no faster than ours. With
# dropout it has 0.19 to 0.55 of eager's speed up to 128x128, and we 0.47 to 1.3.
MIN_ELEMENTS = 1 << 16


def unsupported(
    ids,
    weight,
    position_ids,
    position_weight,
    segment_ids,
    segment_weight,
    norm_weight,
    norm_bias,
    padding_idx,
    eps,
    dropout_p,
):
    if eps is None and dropout_p == 0 and position_weight is None and segment_weight is None:
        # 0.13 to 0.88 of our time up to 1024x768, forward and with backward.
        return "F.embedding is faster where one table is looked up and nothing else is done"
    size = 0 if dropout_p > 0 else MIN_ELEMENTS
    elements = ids.numel() * weight.shape[1]
    return unsupported_tensor(weight, "weight") or unsupported_size(elements, size)


class _Lookups:
    """struct Lookups in csrc/cpu/embedding.cpp, and the tensors whose addresses it holds."""

    def __init__(self, ids, weight, position_ids, position_weight, segment_ids, segment_weight):
        # The dtype of both other tables; the token table stays as it is.
        self.wide = widest(weight, position_weight, segment_weight)
        pairs = (ids, weight), (position_ids, position_weight), (segment_ids, segment_weight)
        numbers, self.kept = [], []
        for i, (each, table) in enumerate(pairs):
            if table is None:
                numbers += 0, 0, 0
                continue
            each = as_dtype(each, torch.int64).contiguous()
            table = (as_dtype(table, self.wide) if i else table).contiguous()
            self.kept += each, table
            numbers += each.data_ptr(), table.data_ptr(), table.shape[0]
        self.numbers = array("q", numbers)


def forward(
    ids,
    weight,
    position_ids,
    position_weight,
    segment_ids,
    segment_weight,
    norm_weight,
    norm_bias,
    padding_idx,
    eps,
    dropout_p,
    seed,
):
    lookups = _Lookups(ids, weight, position_ids, position_weight, segment_ids, segment_weight)
    norm_weight, norm_bias, parameter_dtype = norm_parameters(norm_weight, norm_bias)
    M, N = ids.numel(), weight.shape[1]
    y = weight.new_empty((*ids.shape, N))
    mean = weight.new_empty(ids.shape if eps is not None else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    run(
        _cpu.embedding_forward,
        address(lookups.numbers),
        *pointers(norm_weight, norm_bias, y, mean, rstd, seed),
        *(M, N, eps or 0.0, dropout_p, threshold(dropout_p)),
        *(DTYPES[y.dtype], DTYPES[lookups.wide], parameter_dtype),
    )
    return y, mean, rstd


def backward(
    dy,
    ids,
    weight,
    position_ids,
    position_weight,
    segment_ids,
    segment_weight,
    norm_weight,
    norm_bias,
    mean,
    rstd,
    dropout_p,
    seed,
):
    lookups = _Lookups(ids, weight, position_ids, position_weight, segment_ids, segment_weight)
    dy = dy.contiguous()
    given = norm_weight, norm_bias
    norm_weight, norm_bias, parameter_dtype = norm_parameters(*given)
    M, N = ids.numel(), weight.shape[1]
    dsum = torch.empty_like(dy, dtype=lookups.wide)
    gradients = [empty_gradient(p, dy) for p in (norm_weight, norm_bias)]
    run(
        _cpu.embedding_backward,
        *(dy.data_ptr(), address(lookups.numbers)),
        *pointers(norm_weight, mean, rstd, dsum, *gradients, seed),
        *(M, N, dropout_p, threshold(dropout_p)),
        *(DTYPES[dy.dtype], DTYPES[lookups.wide], parameter_dtype),
    )
    return dsum, *as_wanted(gradients, given)


def table_backward(dsum, ids, rows, dtype, padding_idx):
    dsum, ids = dsum.contiguous(), as_dtype(ids, torch.int64).contiguous()
    dtable = dsum.new_zeros((rows, dsum.shape[-1]), dtype=dtype)
    run(
        _cpu.embedding_table_backward,
        *pointers(dsum, ids, dtable),
        *(ids.numel(), dsum.shape[-1], rows, padding_idx, DTYPES[dsum.dtype], DTYPES[dtype]),
    )
    return dtable
