"""Hugging Face transformers 5: importing this registers attn_implementation="slimkernels"."""

from __future__ import annotations

import importlib.metadata

import torch

try:
    _VERSION = importlib.metadata.version("transformers")
except importlib.metadata.PackageNotFoundError:
    raise ImportError(
        "slimkernels.integrations.huggingface needs transformers 5 or newer, and found none"
    ) from None
if int(_VERSION.split(".")[0]) < 5:
    raise ImportError(
        f"slimkernels.integrations.huggingface needs transformers 5 or newer; found {_VERSION}"
    )

from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402

from slimkernels.integrations._hf_attention import attention  # noqa: E402
from slimkernels.integrations._hf_logits import VocabularyLinear  # noqa: E402
from slimkernels.integrations._hf_mask import mask_function  # noqa: E402
from slimkernels.integrations._swap import swap_back  # noqa: E402

NAME = "slimkernels"

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_function())  # without it every mask would be None


def keep_logits(model: torch.nn.Module) -> None:
    """Compute the logits of a model that replace() has changed as soon as it runs, in training too.

    For a program that reads them after the optimizer's step; the loss then costs what it did.
    """
    for module in model.modules():
        if isinstance(module, VocabularyLinear):
            swap_back(module)
