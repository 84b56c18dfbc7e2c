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
from slimkernels.ops.bias_dropout_add import bias_dropout_add
from slimkernels.ops.cross_entropy import cross_entropy
from slimkernels.ops.geglu import geglu
from slimkernels.ops.gelu import gelu
from slimkernels.ops.layer_norm import layer_norm
from slimkernels.ops.linear import linear
from slimkernels.ops.relu_squared import relu_squared
from slimkernels.ops.rotary import rotary, rotary_tables
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention
from slimkernels.ops.silu import silu
from slimkernels.ops.softmax import softmax
from slimkernels.ops.swiglu import swiglu

__version__ = "0.1.0"

__all__ = [
    "AttentionVariant",
    "BackendError",
    "RelativeBias",
    "ScoreFunction",
    "add_layer_norm",
    "bias_dropout_add",
    "cross_entropy",
    "explain",
    "geglu",
    "gelu",
    "info",
    "layer_norm",
    "linear",
    "nn",
    "relu_squared",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
    "t5_relative_bias",
    "use_backend",
]
