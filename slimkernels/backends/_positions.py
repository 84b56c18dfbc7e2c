"""Rows that were taken by position, put back: what the backends of linear_cross_entropy share."""

import torch
from torch import Tensor


def scatter_rows(rows: Tensor, positions: Tensor, count: int) -> Tensor:
    """(count, C): the sum of the rows (K, C) at each of `positions`, which may repeat.

    The gradient of an embedding's look-up: always added up in the same order, where index_add_ on
    a GPU is not. positions  (K,) int64, in [0, count)
    """
    return torch.ops.aten.embedding_dense_backward(rows, positions, count, -1, False)
