"""torch.nn's modules on the library's kernels: same constructors, state_dict keys and outputs.

Each is a subclass of torch.nn's, so that code that looks for ``torch.nn.LayerNorm`` finds it. An
argument that is not implemented raises ValueError; none is accepted and ignored.
"""

from slimkernels.nn.cross_entropy import CrossEntropyLoss
from slimkernels.nn.dropout import Dropout
from slimkernels.nn.gelu import GELU
from slimkernels.nn.group_norm import GroupNorm
from slimkernels.nn.layer_norm import LayerNorm
from slimkernels.nn.linear_cross_entropy import LinearCrossEntropy
from slimkernels.nn.multihead_attention import MultiheadAttention
from slimkernels.nn.rms_norm import RMSNorm
from slimkernels.nn.silu import SiLU
from slimkernels.nn.softmax import LogSoftmax, Softmax
from slimkernels.nn.transformer import (
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GELU",
    "CrossEntropyLoss",
    "Dropout",
    "GroupNorm",
    "LayerNorm",
    "LinearCrossEntropy",
    "LogSoftmax",
    "MultiheadAttention",
    "RMSNorm",
    "SiLU",
    "Softmax",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
