"""Where a run computes, and in which precision its matrix products are."""

from __future__ import annotations

import torch


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one.

    Errors  ValueError if torch cannot use it, in one sentence
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"the device {name!r} cannot be used: it must be cpu, cuda or cuda:N")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {name!r} cannot be used: {reason}") from error


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
