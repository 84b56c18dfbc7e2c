"""Rotary position embedding (Su et al. 2021) of query and key at once."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.dispatch import Op, distinct, kernel_op, needs_gradient
from slimkernels.ops._checks import (
    check_flag,
    check_integer,
    check_number,
    check_tensor,
    is_readable,
    value_range,
)
from slimkernels.ops._first_order import first_order
from slimkernels.ops._ragged import sequence_of

NAME = "rotary"
_INTEGERS = (torch.int32, torch.int64)


def rotary_tables(
    T: int,
    dim: int,
    base: float = 10000.0,
    *,
    scale: float = 1.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles scale * t * base^(-2 i / dim), for rotary().

    T        positions t from 0 to T - 1
    dim      how many elements of each head are turned, even; i counts its dim / 2 pairs
    base     the wavelengths go from 2 pi to 2 pi base^(1 - 2 / dim) tokens
    scale    multiplies positions: below 1 it interpolates between those seen in training
             (Chen et al. 2023)
    Returns  cos, sin: (T, dim / 2) float32, rounded from float64: a float32 angle of token 100000
             is off by up to 0.004
    Errors   ValueError naming the argument that is out of range
    """
    name = "rotary_tables"
    for what, value in (("T", T), ("dim", dim)):
        check_integer(name, what, value)
        if value < 0:
            raise ValueError(f"{name}: {what} must not be negative; got {value}")
    if dim == 0 or dim % 2:
        raise ValueError(f"{name}: dim must be even and positive; got {dim}")
    for what, value in (("base", base), ("scale", scale)):
        check_number(name, what, value)
    if base <= 0:
        raise ValueError(f"{name}: base must be positive; got {base}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    positions = torch.arange(T, dtype=torch.float64, device=device) * scale
    angles = torch.outer(positions, base**-exponents)
    return angles.cos().float(), angles.sin().float()


def rotary_reference(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, of (B, T, H, D), in float32, or in float64 if query is.

    positions  (B, T); None for offset + t
    """
    if positions is None:
        positions = torch.arange(query.shape[1], device=query.device)[None] + offset
    known = (positions >= 0) & (positions < cos.shape[0])
    at = positions.where(known, 0)
    wide = torch.promote_types(query.dtype, torch.float32)
    # (B, T, 1, half); NaN, where a kernel must not read either, is easier to find than a wrong turn
    cos, sin = (t.to(wide)[at].masked_fill(~known[..., None], float("nan")) for t in (cos, sin))
    return tuple(_turned(x, cos[:, :, None], sin[:, :, None], interleaved) for x in (query, key))


def _turned(x, cos, sin, interleaved):
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def rotary(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    offset: int | Tensor = 0,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """query and key with the pairs of each head turned by the angles of their token's position.

    query         (B, H, T, D), or (T, H, D) of sequences one after the other; float32, float16,
                  bfloat16 or float64. Views, such as parts of one packed projection, are read
                  where they lie.
    key           (B, Hkv, T, D), or (T, Hkv, D); query's dtype and device
    cos, sin      (positions, rotary_dim / 2), float32 or query's dtype: rotary_tables() makes
                  them. Elements from rotary_dim on are copied.
    interleaved   pairs are neighbours, (2 i, 2 i + 1), as in GPT-J and in Su et al.; otherwise
                  (i, i + rotary_dim / 2), as in GPT-NeoX and Llama
    offset        position of the first token: an integer, or (B,) int32 or int64, one a sequence
    position_ids  each token's position, (T,) or (B, T) int32 or int64, instead of offset
    cu_seqlens    (sequences + 1,) int32, for (T, H, D): where each sequence starts, and the end;
                  positions start anew in each
    Returns       (query, key) of the inputs' shapes and dtype, in memory of their own, ordered
                  (B, T, H, D); computed in float32 (float64 for float64)
    Saves         cos, sin and the positions
    Errors        ValueError naming the argument whose value, shape, dtype or device is wrong. A
                  position outside the tables gives one where the host can see it, that is on a
                  CPU; on a GPU and under torch.compile it gives NaN.

    flash-attn's apply_rotary_emb(x, cos, sin) has x (B, T, H, D): pass x.transpose(1, 2), its
    seqlen_offsets as offset. Hugging Face's apply_rotary_pos_emb(q, k, cos, sin) has cos (B, T, D),
    both halves alike: pass cos[0, :, : D // 2].

    Kernels give cos and sin no gradient; where they want one the torch backend runs.
    """
    arguments = _arguments(
        *(query, key, cos, sin),
        interleaved=interleaved,
        offset=offset,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
    )
    chosen = ROTARY.select(*arguments, backend=backend)
    if chosen == "torch":
        outputs = rotary_reference(*arguments)
    elif needs_gradient(*arguments[:2]):
        outputs = _Rotary.apply(*distinct(*arguments), chosen)
    else:
        outputs = rotary_forward(*arguments, chosen)
    return tuple(y[0] if query.dim() == 3 else y.transpose(1, 2) for y in outputs)


def _arguments(
    query, key, cos, sin, *, interleaved=False, offset=0, position_ids=None, cu_seqlens=None
):
    """Tensors as (B, T, H, D), and the positions as (B, T), (1, T) or None."""
    _check_heads(query, key)
    _check_tables(query, cos, sin)
    check_flag(NAME, "interleaved", interleaved)
    is_ragged = query.dim() == 3
    x, k = (t[None] if is_ragged else t.transpose(1, 2) for t in (query, key))
    if cu_seqlens is not None:
        if not is_ragged:
            _refuse("cu_seqlens", "None with a query of (B, H, T, D)", "a value")
        _check_boundaries(cu_seqlens, x)
    if position_ids is not None:
        _check_positions(position_ids, x, offset, cu_seqlens)
        positions, offset = (position_ids[None] if position_ids.dim() == 1 else position_ids), 0
    else:
        positions, offset = _positions(offset, cu_seqlens, x)
    _check_range(positions, offset, x.shape[1], cos.shape[0])
    return x, k, cos, sin, positions, offset, interleaved


def _refuse(name, expected, got):
    raise ValueError(f"{NAME}: {name} must be {expected}; got {got}")


def _check_heads(query, key):
    for name, tensor in (("query", query), ("key", key)):
        check_tensor(NAME, name, tensor)
        if tensor.dim() not in (3, 4):
            _refuse(name, "(B, H, T, D) or (T, H, D)", f"shape {tuple(tensor.shape)}")
    for what in ("dtype", "device"):
        expected, actual = getattr(query, what), getattr(key, what)
        if expected != actual:
            raise ValueError(f"{NAME}: key must have query's {what} {expected}; got {actual}")
    if query.shape[:1] + query.shape[2:] != key.shape[:1] + key.shape[2:]:
        raise ValueError(
            f"{NAME}: key must have query's shape {tuple(query.shape)}, but for the heads; "
            f"got {tuple(key.shape)}"
        )


def _check_tables(query, cos, sin):
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(NAME, name, table)
        if table.dim() != 2 or not 0 < 2 * table.shape[1] <= max(query.shape[-1], 1):
            raise ValueError(
                f"{NAME}: {name} must have shape (positions, rotary_dim / 2), with rotary_dim at "
                f"most query's last dimension {query.shape[-1]}; got {tuple(table.shape)}"
            )
        if table.dtype not in (torch.float32, query.dtype):
            _refuse(name, f"float32 or {query.dtype} like query", table.dtype)
        if table.device != query.device:
            _refuse(name, f"on {query.device} like query", table.device)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"{NAME}: sin must have cos' shape {tuple(cos.shape)} and dtype {cos.dtype}; got "
            f"{tuple(sin.shape)} and {sin.dtype}"
        )


def _check_integers(name, value, x, *shapes):
    """`value` is an integer tensor of one of these shapes, if any are given."""
    if not isinstance(value, Tensor):
        _refuse(name, "a tensor", type(value).__name__)
    if value.dtype not in _INTEGERS:
        _refuse(name, "int32 or int64", value.dtype)
    if value.device != x.device:
        _refuse(name, f"on {x.device} like query", value.device)
    if shapes and not any(value.shape == shape for shape in shapes):
        named = " or ".join(map(str, dict.fromkeys(shapes)))
        raise ValueError(f"{NAME}: {name} must have shape {named}; got {tuple(value.shape)}")


def _check_boundaries(cu_seqlens, x):
    name = "cu_seqlens"
    _check_integers(name, cu_seqlens, x)
    if cu_seqlens.dtype != torch.int32:
        _refuse(name, "int32", cu_seqlens.dtype)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        got = tuple(cu_seqlens.shape)
        raise ValueError(f"{NAME}: {name} must have shape (sequences + 1,); got {got}")
    if not is_readable(cu_seqlens):
        return
    starts, T = cu_seqlens.tolist(), x.shape[1]
    if starts[0] != 0 or starts[-1] != T or sorted(starts) != starts:
        _refuse(name, f"from 0 to the {T} tokens, never falling", starts)


def _check_positions(position_ids, x, offset, cu_seqlens):
    B, T = x.shape[:2]
    _check_integers("position_ids", position_ids, x, (T,), (B, T), (1, T))
    if cu_seqlens is not None or isinstance(offset, Tensor) or offset != 0:
        other = "offset" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(f"{NAME}: {other} must not be given with position_ids, which has it all")


def _positions(offset, cu_seqlens, x):
    """What position_ids and offset say together, from offset and cu_seqlens."""
    B, T = x.shape[:2]
    if isinstance(offset, Tensor):
        sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _check_integers("offset", offset, x, (sequences,))
    else:
        check_integer(NAME, "offset", offset)
    if cu_seqlens is None and not isinstance(offset, Tensor):
        return None, offset
    if cu_seqlens is None:
        # One token a sequence, as in decoding, needs no kernel here.
        return (offset[:, None] if T == 1 else offset[:, None] + _tokens(x)), 0
    sequence = sequence_of(cu_seqlens, T) - 1
    # Those of no sequence, which only a GPU may have, read the last: an index must not run out.
    sequence = sequence.clamp(0, max(cu_seqlens.shape[0] - 2, 0))
    starts = cu_seqlens[:-1] - offset
    return (_tokens(x) - starts[sequence] if starts.shape[0] else _tokens(x))[None], 0


def _tokens(x):
    return torch.arange(x.shape[1], device=x.device)


def _check_range(positions, offset, T, rows):
    if T == 0:
        return
    low, high = offset, offset + T - 1
    if positions is not None:
        if not is_readable(positions) or positions.numel() == 0:
            return
        low, high = value_range(positions)
    if low < 0 or high >= rows:
        raise ValueError(
            f"{NAME}: cos must have a row for each position; it has {rows}, and positions go from "
            f"{low} to {high}"
        )


# Order: triton before cuda until a table of GPU measurements says otherwise.
ROTARY = Op(NAME, order=("triton", "cuda", "cpu"), arguments=_arguments)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin, positions, offset, interleaved, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.offset = offset
        ctx.interleaved = interleaved
        ctx.backend = backend
        return rotary_forward(query, key, cos, sin, positions, offset, interleaved, backend)

    @staticmethod
    @first_order(NAME)
    def backward(ctx, saved, dquery, dkey):
        gradients = rotary_backward(dquery, dkey, *saved, ctx.offset, ctx.interleaved, ctx.backend)
        return *gradients, None, None, None, None, None, None


def _fake(query, key, cos, sin, positions, offset, interleaved, backend):
    return query.new_empty(query.shape), key.new_empty(key.shape)


@kernel_op("rotary_forward", _fake)
def rotary_forward(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = ROTARY.modules[backend]
    return module.forward(query, key, cos, sin, positions, offset, interleaved)


@kernel_op("rotary_backward", _fake)
def rotary_backward(
    dquery: Tensor,
    dkey: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    offset: int,
    interleaved: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    module = ROTARY.modules[backend]
    return module.backward(dquery, dkey, cos, sin, positions, offset, interleaved)
