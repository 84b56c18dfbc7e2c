"""The swaps of torch.nn's own modules."""

from __future__ import annotations

import torch
from torch.nn import Module

from slimkernels import nn
from slimkernels.integrations._swap import Swap, class_of


def _inplace(module: Module) -> str | None:
    return "inplace=True writes its input, which ours never does" if module.inplace else None


def _no_dim(module: Module) -> str | None:
    return "dim=None leaves the dimension to torch's guess" if module.dim is None else None


def _attention(module: Module) -> str | None:
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv is not implemented"
    return "add_zero_attn is not implemented" if module.add_zero_attn else None


def _stack(layer: type[Module], ours: type[Module]):
    """The refusal of a stack whose layers may rely on how torch's hands them their masks."""

    def refuse(module: Module) -> str | None:
        for child in module.layers:
            if class_of(child) not in (layer, ours) or "forward" in vars(child):
                return f"a layer of it is not torch.nn's {layer.__name__}"
        return None

    return refuse


_ENCODERS = _stack(torch.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer)
_DECODERS = _stack(torch.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer)

SWAPS = {
    swap.original: swap
    for swap in (
        Swap(torch.nn.LayerNorm, nn.LayerNorm),
        Swap(torch.nn.RMSNorm, nn.RMSNorm),
        Swap(torch.nn.GroupNorm, nn.GroupNorm),
        Swap(torch.nn.GELU, nn.GELU),
        Swap(torch.nn.SiLU, nn.SiLU, _inplace),
        Swap(torch.nn.Softmax, nn.Softmax, _no_dim),
        Swap(torch.nn.LogSoftmax, nn.LogSoftmax, _no_dim),
        Swap(torch.nn.CrossEntropyLoss, nn.CrossEntropyLoss),
        Swap(torch.nn.Dropout, nn.Dropout, _inplace),
        Swap(torch.nn.MultiheadAttention, nn.MultiheadAttention, _attention),
        Swap(torch.nn.TransformerEncoderLayer, nn.TransformerEncoderLayer),
        Swap(torch.nn.TransformerEncoder, nn.TransformerEncoder, _ENCODERS),
        Swap(torch.nn.TransformerDecoderLayer, nn.TransformerDecoderLayer),
        Swap(torch.nn.TransformerDecoder, nn.TransformerDecoder, _DECODERS),
    )
}
