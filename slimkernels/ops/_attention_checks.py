"""What attention asks of its tensors and integers: each check raises one sentence that names the
argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkernels.ops._checks import check_tensor, is_readable, value_range

NAME = "scaled_dot_product_attention"


def refuse(name, expected, got):
    raise ValueError(f"{NAME}: {name} must be {expected}; got {got}")


def check_tensors(query, key, value, ragged, enable_gqa):
    layout = "(T, H, D), as cu_seqlens asks" if ragged else "(B, H, T, D)"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(NAME, name, tensor)
        if tensor.dim() != (3 if ragged else 4):
            refuse(name, layout, tuple(tensor.shape))
        if tensor.dtype != query.dtype:
            _refuse_unlike(name, "dtype", query.dtype, tensor.dtype)
        if tensor.device != query.device:
            _refuse_unlike(name, "device", query.device, tensor.device)
    _check_shapes(query.shape, key.shape, value.shape, ragged, enable_gqa)


def _refuse_unlike(name, what, expected, got):
    raise ValueError(f"{NAME}: {name} must have query's {what} {expected}; got {got}")


def _check_shapes(query, key, value, ragged, enable_gqa):
    if query[-1] == 0:
        raise ValueError(f"{NAME}: query {tuple(query)} has no elements in a head")
    if key[-1] != query[-1] or (not ragged and key[0] != query[0]):
        what = "width" if ragged else "batch and width"
        raise ValueError(f"{NAME}: key must have query's {what} {tuple(query)}; got {tuple(key)}")
    if value[:-1] != key[:-1]:
        raise ValueError(
            f"{NAME}: value must have key's shape {tuple(key)} but for the width; "
            f"got {tuple(value)}"
        )
    if value[-1] == 0:
        raise ValueError(f"{NAME}: value {tuple(value)} has no elements in a head")
    heads = -2 if ragged else -3
    H, Hkv = query[heads], key[heads]
    if Hkv == 0 or H % Hkv:
        raise ValueError(f"{NAME}: query's heads must be a multiple of key's {Hkv}; got {H}")
    if Hkv != H and not enable_gqa:
        raise ValueError(
            f"{NAME}: enable_gqa must be True for {H} heads of query on {Hkv} of key; got False"
        )


def check_integers(name, value, query, size):
    if not isinstance(value, Tensor):
        refuse(name, "a tensor", type(value).__name__)
    if value.dtype != torch.int32:
        refuse(name, "int32", value.dtype)
    check_device(name, value, query)
    named = isinstance(size, str)
    if value.dim() != 1 or (not named and value.shape[0] != size):
        expected = size if named else f"({size},), one a sequence"
        raise ValueError(f"{NAME}: {name} must have shape {expected}; got {tuple(value.shape)}")


def check_dense(name, value):
    if value.is_nested or value.layout != torch.strided:
        refuse(name, "a dense tensor", "a nested tensor" if value.is_nested else value.layout)


def check_device(name, value, query):
    if value.device != query.device:
        refuse(name, f"on {query.device} like query", value.device)


def check_parameter(name, value, query):
    """A floating tensor on query's device, in query's dtype or float32."""
    if not isinstance(value, Tensor):
        refuse(name, "a tensor", type(value).__name__)
    if value.dtype not in (query.dtype, torch.float32):
        float32 = "" if query.dtype == torch.float32 else ", or float32"
        refuse(name, f"{query.dtype} like query{float32}", value.dtype)
    check_device(name, value, query)


def check_range(name, expected, values, low, high):
    if not is_readable(values) or values.numel() == 0:
        return
    least, most = value_range(values)
    if least < low or most > high:
        refuse(name, expected, f"{least} to {most}")


def check_boundaries(cu_seqlens, tensor):
    check_integers("cu_seqlens", cu_seqlens, tensor, "(sequences + 1,)")
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{NAME}: cu_seqlens must have shape (sequences + 1,); got (0,)")


def check_boundary_values(cu_seqlens, of, tensor):
    if not is_readable(cu_seqlens):
        return
    values, T = cu_seqlens.tolist(), tensor.shape[0]
    if values[0] != 0 or values[-1] != T:
        raise ValueError(
            f"{NAME}: cu_seqlens of {of} must go from 0 to its {T} tokens; "
            f"got {values[0]} to {values[-1]}"
        )
    if values != sorted(values):
        raise ValueError(f"{NAME}: cu_seqlens of {of} must not fall; got {values}")


def check_key_lengths(key_lengths, query, call):
    if call.ragged:
        raise ValueError(f"{NAME}: key_lengths must be None with cu_seqlens, which has the lengths")
    check_integers("key_lengths", key_lengths, query, query.shape[0])
