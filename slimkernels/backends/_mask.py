"""Where a row of a broadcast mask begins, in six integers that a kernel can take; and columns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MaskRows(NamedTuple):
    """A mask seen as rows, some of which are the same memory.

    Row r of the tensor that is masked splits as r = (outer * middle + m) * inner + i, with m below
    middle and i below inner; its mask begins at
    outer * stride_outer + m * stride_middle + i * stride_inner. Three runs of dimensions are what
    the masks in use need: (B, 1, Tq, Tk) over heads has them all.
    """

    mask: Tensor
    middle: int
    inner: int
    stride_outer: int
    stride_middle: int
    stride_inner: int
    stride_col: int  # 1, or 0 where a row is seen whole or not at all


def mask_rows(mask: Tensor) -> MaskRows:
    """The rows of `mask`, which is expanded to (..., N) and not empty.

    A mask whose strides fit no such description is copied: once each element where that is enough,
    and expanded in memory where broadcast dimensions alternate with others more than twice.
    """
    return _described(mask) or _described(_without_gaps(mask)) or _described(mask.contiguous())


def mask_columns(mask: Tensor) -> MaskRows:
    """The columns of `mask`, which is expanded to (..., N, inner) and not empty.

    Element n of column i in block m begins at m * stride_outer + n * stride_middle +
    i * stride_col. A mask whose strides fit no such description is expanded in memory.
    """
    *_, N, inner = mask.shape
    mask = mask.reshape(-1, N, inner)
    if mask.stride(-1) not in (0, 1):
        mask = mask.contiguous()
    stride_outer, stride_middle, stride_col = mask.stride()
    return MaskRows(mask, 1, 1, stride_outer, stride_middle, 0, stride_col)


def _described(mask: Tensor) -> MaskRows | None:
    *sizes, N = mask.shape
    *strides, stride_col = mask.stride()
    stride_col = stride_col if N > 1 else 0
    runs = _runs(sizes, strides)
    if len(runs) > 3 or stride_col not in (0, 1):
        return None
    runs = [(1, 0)] * (3 - len(runs)) + runs
    (_, stride_outer), (middle, stride_middle), (inner, stride_inner) = runs
    return MaskRows(mask, middle, inner, stride_outer, stride_middle, stride_inner, stride_col)


def _runs(sizes: list[int], strides: list[int]) -> list[tuple[int, int]]:
    """(size, stride) of the dimensions, neighbours that step as one merged."""
    runs: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == stride * size:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs


def _without_gaps(mask: Tensor) -> Tensor:
    """A copy of each element once, expanded again through strides of 0."""
    once = mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())]
    return once.contiguous().expand(mask.shape)
