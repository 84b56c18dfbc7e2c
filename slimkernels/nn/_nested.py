"""NestedTensors, which no kernel takes: torch's own modules do what torch can do with them."""

from __future__ import annotations

from torch import Tensor


def is_nested(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_nested
