"""slimkernels: transformer kernels for PyTorch that are right, fast, and say which one ran."""

from slimkernels import nn
from slimkernels.dispatch import BackendError, explain, use_backend
from slimkernels.info import info
from slimkernels.ops._attention_variant import (
    AttentionVariant,
    RelativeBias,
    ScoreFunction,
    t5_relative_bias,
)
from slimkernels.ops.add_layer_norm import add_layer_norm
from slimkernels.ops.cross_entropy import cross_entropy
from slimkernels.ops.gelu import gelu
from slimkernels.ops.layer_norm import layer_norm
from slimkernels.ops.linear import linear
from slimkernels.ops.linear_cross_entropy import linear_cross_entropy
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention
from slimkernels.ops.softmax import softmax

__version__ = "0.1.0"

__all__ = [
    "AttentionVariant",
    "BackendError",
    "RelativeBias",
    "ScoreFunction",
    "add_layer_norm",
    "cross_entropy",
    "explain",
    "gelu",
    "info",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "nn",
    "scaled_dot_product_attention",
    "softmax",
    "t5_relative_bias",
    "use_backend",
]
