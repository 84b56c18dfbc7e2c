"""Calls that are known to be torch's own: checked before, and found to be faster in ATen.

What ATen computes in microseconds is not to wait for checks and for the choice of a backend, which
come to the same each time. A call is known by everything that they look at.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from slimkernels.dispatch import is_forced

Signature = tuple

# Signatures for which an op's automatic choice was torch, and one function of torch is all of it.
_known: set[Signature] = set()
_MOST_KNOWN = 4096

_TENSORS = (torch.Tensor, torch.nn.Parameter)
_ORDINARY = (int, float, bool, str, tuple, torch.Size, type(None))


def signature_of(*call: object) -> Signature | None:
    """What is looked at of an op's name and arguments; None where more than that has a say.

    That is modes, orders and transforms, and tensors that are not plain and on the CPU: on a GPU
    the host is ahead. Strides have none: torch gets the tensors as they are, either way.
    """
    if torch.compiler.is_compiling() or is_forced() or torch.is_autocast_enabled("cpu"):
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    parts = []
    for arg in call:
        kind = type(arg)
        if kind in _TENSORS:
            if not arg.is_cpu or arg.is_nested or arg.layout is not torch.strided:
                return None
            parts += arg.shape, arg.dtype
        elif kind in _ORDINARY:
            parts += kind, arg  # 1 and True are equal, and only one of them passes a check
        else:
            return None
    return tuple(parts)


def is_torchs_own(signature: Signature | None) -> bool:
    return signature in _known


def remember(signature: Signature | None) -> None:
    """The call of this signature was given to one function of torch."""
    if signature is None:
        return
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known.add(signature)


def forget() -> None:
    """For who changes what a choice depends on, as tests do."""
    _known.clear()
