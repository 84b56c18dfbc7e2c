"""Argument checks that several ops share: each raises one sentence naming op and argument."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(op: str, name: str, value: object) -> None:
    """`value` must be a Tensor of a dtype that the ops compute in."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor; got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise ValueError(
            f"{op}: {name} must be float32, float16, bfloat16 or float64; got {value.dtype}"
        )


def check_parameter(op: str, name: str, value: object, x: Tensor, size: int) -> None:
    """`value` is None or a (size,) vector on x's device, in x's dtype or float32."""
    if value is None:
        return
    check_tensor(op, name, value)
    if tuple(value.shape) != (size,):
        raise ValueError(
            f"{op}: {name} must have shape ({size},), the normalized dimension of input "
            f"{tuple(x.shape)}; got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like input; got {value.device}")
    if value.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{op}: {name} must be {x.dtype} like input, or float32; got {value.dtype}"
        )


def check_dropout(op: str, dropout_p: float) -> None:
    """`dropout_p` is a probability of dropping, below 1."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1); got {dropout_p}")
