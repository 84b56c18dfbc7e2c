"""slimkernels: transformer kernels for PyTorch that are right, fast, and say which one ran."""

from slimkernels import nn, optim
from slimkernels.dispatch import BackendError, explain, use_backend
from slimkernels.info import info
from slimkernels.integrations.replace import replace, restore
from slimkernels.ops._attention_variant import (
    AttentionVariant,
    RelativeBias,
    t5_relative_bias,
)
from slimkernels.ops._score_function import ScoreFunction
from slimkernels.ops.add_layer_norm import add_layer_norm
from slimkernels.ops.add_rms_norm import add_rms_norm
from slimkernels.ops.bias_dropout_add import bias_dropout_add
from slimkernels.ops.cross_entropy import cross_entropy
from slimkernels.ops.embedding import embedding
from slimkernels.ops.geglu import geglu
from slimkernels.ops.gelu import gelu
from slimkernels.ops.group_norm import group_norm
from slimkernels.ops.layer_norm import layer_norm
from slimkernels.ops.linear import linear
from slimkernels.ops.linear_cross_entropy import linear_cross_entropy
from slimkernels.ops.log_softmax import log_softmax
from slimkernels.ops.relu_squared import relu_squared
from slimkernels.ops.rms_norm import rms_norm
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
    "add_rms_norm",
    "bias_dropout_add",
    "cross_entropy",
    "embedding",
    "explain",
    "geglu",
    "gelu",
    "group_norm",
    "info",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "nn",
    "optim",
    "relu_squared",
    "replace",
    "restore",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
    "t5_relative_bias",
    "use_backend",
]
