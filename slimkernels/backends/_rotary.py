"""What every backend's kernels refuse of rotary's tables."""

from __future__ import annotations

from torch import Tensor


def unsupported_tables(cos: Tensor, sin: Tensor) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return "its kernels give no gradient to cos and sin, one of which requires it"
    return None
