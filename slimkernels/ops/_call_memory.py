"""What has been found out about calls, for the next one like it.

A call is (tensors, options): tensors or None, and all other arguments. Calls are alike in device,
dtype and shape of each tensor and in type and value of each option. Nothing is kept of a call with
more to it: a tensor of another class or without plain memory, an option that is not made of
numbers, strings and None.

torch.compile cannot trace a CallMemory: ask is_dynamo_compiling() first. is_compiling() would take
seven times as long.
"""

from __future__ import annotations

import torch
from torch._C import _are_functorch_transforms_active as is_transformed


class NoCallMemory:
    """Keeps nothing: every call is checked, and chooses its backend."""

    def __init__(self, most: int = 0) -> None:
        pass

    def get(self, call: tuple[tuple, tuple]) -> None:
        """What was put for a call like this one, or None."""

    def put(self, call: tuple[tuple, tuple], value: object) -> None:
        """Keep `value` for calls like this one."""

    def clear(self) -> None:
        pass

    def __len__(self) -> int:
        return 0


try:
    from slimkernels._cpu import CallMemory, recognize_torch
except ImportError:
    CallMemory = NoCallMemory
else:
    # In Python it would take longer than the checks that it saves.
    if not recognize_torch(torch.Tensor, torch.nn.Parameter, torch.Size, is_transformed):
        CallMemory = NoCallMemory
