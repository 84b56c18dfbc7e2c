"""Optimizers that update many tensors in a few launches, with torch.optim's interface."""

from slimkernels.optim.adamw import AdamW
from slimkernels.optim.lamb import LAMB
from slimkernels.optim.muon import Muon

__all__ = ["LAMB", "AdamW", "Muon"]
