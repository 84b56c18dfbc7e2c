"""The sum of token, position and segment embeddings with its LayerNorm and dropout, in one pass:
what a transformer begins with (Devlin et al. 2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.backends._embedding import widest
from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import (
    check_dropout,
    check_eps,
    check_flag,
    check_integer,
    check_like,
    check_parameter,
    check_tensor,
    is_readable,
    value_range,
)
from slimkernels.ops._dropout import draw_seed, dropped
from slimkernels.ops._first_order import first_order
from slimkernels.ops.bias_dropout_add import bias_dropout_add_backward
from slimkernels.ops.layer_norm import gradient_of, layer_norm_by_torch, layer_norm_reference

NAME = "embedding"
_INTEGERS = (torch.int64, torch.int32)
_NO_PADDING = -1  # no id


def embedding_reference(
    ids: Tensor,
    weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    segment_ids: Tensor | None,
    segment_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    padding_idx: int,
    eps: float | None,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """The definition, rounded once. No eps means no norm, a seed means dropout."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = F.embedding(ids, weight, None if padding_idx == _NO_PADDING else padding_idx).to(wide)
    for others, table in ((position_ids, position_weight), (segment_ids, segment_weight)):
        y = y if table is None else y + F.embedding(others, table)
    y = y if eps is None else layer_norm_reference(y, norm_weight, norm_bias, eps)
    return (y if seed is None else dropped(y, seed, dropout_p)).to(weight.dtype)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *,
    position_ids: Tensor | None = None,
    position_weight: Tensor | None = None,
    segment_ids: Tensor | None = None,
    segment_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """dropout(layer_norm(weight[input] + position_weight[position_ids]
    + segment_weight[segment_ids])), each part but the first optional, in one pass.

    input            token ids of any shape (...), int64 or int32
    weight           (V, C) float32, float16, bfloat16 or float64
    padding_idx      this id's row of weight gets no gradient; negative counts from the end
    position_ids     int64 or int32, what broadcasts to input's shape, as (T,) does to (B, T)
    position_weight  (positions, C), in weight's dtype or float32
    segment_ids, segment_weight    likewise
    norm_weight, norm_bias         (C,), in weight's dtype or float32; None for 1 and 0
    eps              added to the variance. The sum is normalised where eps, norm_weight or
                     norm_bias is given; eps is then 1e-5 if None
    dropout_p        probability of dropping an element, in [0, 1); survivors are multiplied by
                     1 / (1 - dropout_p)
    training         False turns dropout off
    Returns          (..., C) in weight's dtype, under autocast too; computed in float32 (float64
                     for float64) and rounded once; the backend "torch" rounds each sum, as eager
                     does
    Saves            the ids and the dropout's seed; with a norm also the tables, norm_weight, mean
                     and rstd (one float32 each a row). The sum is not stored: backward looks its
                     parts up again
    Errors           ValueError naming the argument whose value, shape, dtype or device is wrong.
                     An id out of range gives one on the CPU. On a GPU and in compiled code, where
                     looking would cost a synchronisation, its row of the output is NaN and its
                     table gets nothing from it, while through a norm the other tables and the
                     norm's parameters get NaN; the backend "torch" then does what F.embedding does

    Gradients of the tables are dense, and the same bits on every run.
    """
    args = _arguments(
        *(input, weight, padding_idx),
        position_ids=position_ids,
        position_weight=position_weight,
        segment_ids=segment_ids,
        segment_weight=segment_weight,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        dropout_p=dropout_p,
        training=training,
    )
    chosen = EMBEDDING.select(*args, backend=backend)
    seed = draw_seed(input.device) if args[-1] > 0 else None
    if chosen == "torch":
        return _by_torch(*args, seed)
    if needs_gradient(weight, position_weight, segment_weight, norm_weight, norm_bias):
        return _Embedding.apply(*distinct(*args), seed, chosen)
    return embedding_forward(*args, seed, chosen)[0]


def _by_torch(ids, weight, position_ids, position_weight, segment_ids, segment_weight, *rest):
    """What eager code would call."""
    norm_weight, norm_bias, padding_idx, eps, dropout_p, seed = rest
    y = F.embedding(ids, weight, None if padding_idx == _NO_PADDING else padding_idx)
    for others, table in ((position_ids, position_weight), (segment_ids, segment_weight)):
        y = y if table is None else y + F.embedding(others, table)
    y = y if eps is None else layer_norm_by_torch(y, norm_weight, norm_bias, eps, False)
    y = y if seed is None else dropped(y, seed, dropout_p)
    return y if y.dtype == weight.dtype else y.to(weight.dtype)


def _arguments(
    input,
    weight,
    padding_idx=None,
    *,
    position_ids=None,
    position_weight=None,
    segment_ids=None,
    segment_weight=None,
    norm_weight=None,
    norm_bias=None,
    eps=None,
    dropout_p=0.0,
    training=True,
):
    _check_ids("input", input)
    _check_table("weight", weight)
    _check_range("input", input, weight)
    for which, ids, table in (
        ("position", position_ids, position_weight),
        ("segment", segment_ids, segment_weight),
    ):
        if (ids is None) != (table is None):
            given, missing = ("ids", "weight") if table is None else ("weight", "ids")
            _refuse(f"{which}_{missing}", f"given with {which}_{given}", None)
        if table is not None:
            _check_other(which, ids, table, input, weight)
    position_ids, segment_ids = (
        ids if ids is None or ids.shape == input.shape else ids.expand(input.shape)
        for ids in (position_ids, segment_ids)
    )
    for name, parameter in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        check_parameter(NAME, name, parameter, weight, weight.shape[1], "the columns", "weight")
    if eps is not None:
        check_eps(NAME, eps)
    elif norm_weight is not None or norm_bias is not None:
        eps = 1e-5
    check_dropout(NAME, dropout_p)
    check_flag(NAME, "training", training)
    tables = input, weight, position_ids, position_weight, segment_ids, segment_weight
    padding_idx = _padding(padding_idx, weight.shape[0])
    return *tables, norm_weight, norm_bias, padding_idx, eps, dropout_p if training else 0.0


def _refuse(name, expected, got):
    raise ValueError(f"{NAME}: {name} must be {expected}; got {got}")


def _check_ids(name, ids):
    if not isinstance(ids, Tensor):
        _refuse(name, "a tensor", type(ids).__name__)
    if ids.is_nested or ids.layout != torch.strided:
        _refuse(name, "a dense tensor", "a nested tensor" if ids.is_nested else ids.layout)
    if ids.dtype not in _INTEGERS:
        _refuse(name, "int64 or int32", ids.dtype)


def _check_table(name, table):
    check_tensor(NAME, name, table)
    if table.dim() != 2 or table.shape[1] == 0:
        _refuse(name, "a matrix (rows, C) with C at least 1", tuple(table.shape))


def _check_other(which, ids, table, input, weight):
    """The ids and the table of positions or segments."""
    name = f"{which}_ids"
    _check_ids(name, ids)
    sizes = zip(reversed(ids.shape), reversed(input.shape), strict=False)
    if ids.dim() > input.dim() or any(m not in (1, n) for m, n in sizes):
        raise ValueError(
            f"{NAME}: {name} must broadcast to input {tuple(input.shape)}; got {tuple(ids.shape)}"
        )
    _check_table(f"{which}_weight", table)
    if table.shape[1] != weight.shape[1]:
        _refuse(f"{which}_weight", f"(rows, {weight.shape[1]}) like weight", tuple(table.shape))
    check_like(NAME, f"{which}_weight", table, weight, "weight")
    _check_range(name, ids, table)


def _check_range(name, ids, table):
    if ids.device != table.device:
        _refuse(name, f"on {table.device} like its table", ids.device)
    if not is_readable(ids) or ids.numel() == 0:
        return
    low, high = value_range(ids)
    if low < 0 or high >= table.shape[0]:
        _refuse(name, f"in [0, {table.shape[0]})", low if low < 0 else high)


def _padding(padding_idx, V):
    if padding_idx is None:
        return _NO_PADDING
    check_integer(NAME, "padding_idx", padding_idx)
    if not -V <= padding_idx < V:
        _refuse("padding_idx", f"in [-{V}, {V}), the rows of weight", padding_idx)
    return padding_idx % V


# Order: triton before cuda until a table of GPU measurements says otherwise.
EMBEDDING = Op(NAME, order=("triton", "cuda", "cpu"), arguments=_arguments)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *parts, norm_weight, norm_bias, padding_idx, eps, dropout_p, seed, backend = args
        y, mean, rstd = embedding_forward(*args)
        ids, tables = parts[::2], parts[1::2]
        ctx.tables = [None if t is None else (t.shape[0], t.dtype) for t in tables]
        ctx.wide = widest(*tables)
        # The gradient of a plain sum does not depend on what was added.
        normed = (*tables, norm_weight, norm_bias, mean, rstd) if eps is not None else ()
        ctx.save_for_backward(seed, *ids, *normed)
        ctx.padding_idx, ctx.dropout_p, ctx.backend = padding_idx, dropout_p, backend
        return y

    @staticmethod
    @first_order(NAME)
    def backward(ctx, saved, dy):
        seed, *ids = saved[:4]
        dnorm_weight = dnorm_bias = None
        if len(saved) > 4:
            *tables, norm_weight, norm_bias, mean, rstd = saved[4:]
            parts = [t for pair in zip(ids, tables, strict=True) for t in pair]
            norm_bias = norm_bias if ctx.needs_input_grad[7] else None
            dsum, dnorm_weight, dnorm_bias = embedding_backward(
                *(dy, *parts, norm_weight, norm_bias, mean, rstd, ctx.dropout_p, seed, ctx.backend)
            )
            dnorm_weight = None if norm_weight is None else dnorm_weight
            dnorm_bias = None if norm_bias is None else dnorm_bias
        elif seed is not None:
            dsum = dy.to(ctx.wide)
            dsum, _ = bias_dropout_add_backward(dsum, None, ctx.dropout_p, seed, ctx.backend)
        else:
            dsum = dy
        gradients = [None] * 6
        for i, padding_idx in enumerate((ctx.padding_idx, _NO_PADDING, _NO_PADDING)):
            if ctx.needs_input_grad[2 * i + 1]:  # a frozen table costs nothing
                size = *ctx.tables[i], padding_idx
                gradients[2 * i + 1] = embedding_table_backward(dsum, ids[i], *size, ctx.backend)
        return *gradients, dnorm_weight, dnorm_bias, None, None, None, None, None


def _forward_fake(ids, weight, *rest):
    eps = rest[-4]
    y = weight.new_empty((*ids.shape, weight.shape[1]))
    mean = weight.new_empty(ids.shape if eps is not None else 0, dtype=torch.float32)
    return y, mean, torch.empty_like(mean)


@kernel_op("embedding_forward", _forward_fake)
def embedding_forward(
    ids: Tensor,
    weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    segment_ids: Tensor | None,
    segment_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    padding_idx: int,
    eps: float | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd of the rows, which are empty without eps."""
    return EMBEDDING.modules[backend].forward(
        *(ids, weight, position_ids, position_weight, segment_ids, segment_weight),
        *(norm_weight, norm_bias, padding_idx, eps, dropout_p, seed),
    )


def _backward_fake(dy, ids, weight, _, position_weight, __, segment_weight, *rest):
    norm_weight, norm_bias = rest[:2]
    dsum = dy.new_empty(dy.shape, dtype=widest(weight, position_weight, segment_weight))
    return dsum, gradient_of(norm_weight, dy), gradient_of(norm_bias, dy)


@kernel_op("embedding_backward", _backward_fake)
def embedding_backward(
    dy: Tensor,
    ids: Tensor,
    weight: Tensor,
    position_ids: Tensor | None,
    position_weight: Tensor | None,
    segment_ids: Tensor | None,
    segment_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the normalised sum, in the widest of the tables' dtypes, and the norm's."""
    return EMBEDDING.modules[backend].backward(
        *(dy, ids, weight, position_ids, position_weight, segment_ids, segment_weight),
        *(norm_weight, norm_bias, mean, rstd, dropout_p, seed),
    )


def _table_backward_fake(dsum, ids, rows, dtype, padding_idx, backend):
    return dsum.new_empty((rows, dsum.shape[-1]), dtype=dtype)


@kernel_op("embedding_table_backward", _table_backward_fake)
def embedding_table_backward(
    dsum: Tensor, ids: Tensor, rows: int, dtype: torch.dtype, padding_idx: int, backend: str
) -> Tensor:
    """(rows, C): each row the sum of the dsum (..., C) of its ids (...), 0 for padding_idx."""
    module = EMBEDDING.modules[backend]
    return module.table_backward(dsum, ids, rows, dtype, padding_idx)
