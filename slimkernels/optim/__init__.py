"""Optimizers that update many tensors in one kernel, with torch.optim's interface."""

from slimkernels.optim.adamw import AdamW

__all__ = ["AdamW"]
