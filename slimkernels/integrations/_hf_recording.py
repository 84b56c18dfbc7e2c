"""What a model of transformers collects from its modules while it runs."""

from __future__ import annotations

from collections.abc import Collection

import torch

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None


def recorded() -> Collection[str] | None:
    """Names of what is collected: "hidden_states", "attentions"; None where nobody knows."""
    if _active_collector is None or torch.compiler.is_compiling():
        return None
    return (_active_collector.get() or {}).keys()
