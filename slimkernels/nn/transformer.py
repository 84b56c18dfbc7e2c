"""torch.nn.TransformerEncoderLayer and TransformerEncoder (Vaswani et al. 2017), fused.

Where torch runs dropout, addition and norm one after another, a post-norm layer here runs
add_layer_norm once; the first linear layer's bias is added inside gelu's pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.nn.gelu import GELU
from slimkernels.nn.layer_norm import LayerNorm
from slimkernels.nn.multihead_attention import MultiheadAttention
from slimkernels.ops.add_layer_norm import add_layer_norm
from slimkernels.ops.gelu import gelu
from slimkernels.ops.linear import linear

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer, in eval as in training: there is no separate fast path.

    The submodules hold the parameters and rates. One of the class that this layer made it of,
    without hooks, is fused with its neighbours; any other (an adapter around it, a pruned or a
    parametrized one, another norm) is called, as in torch.

    Errors  ValueError for an activation by an unknown name, and as in MultiheadAttention
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        if isinstance(activation, str) and activation not in _ACTIVATIONS:
            raise ValueError(
                f"TransformerEncoderLayer: activation must be 'relu', 'gelu' or a function; "
                f"got {activation!r}"
            )
        # Not torch's own __init__, which would make its attention and norms first. The same
        # modules in the same order: the same seed gives the same parameters.
        torch.nn.Module.__init__(self)
        where = {"device": device, "dtype": dtype}
        self.self_attn = MultiheadAttention(
            d_model, nhead, dropout=dropout, bias=bias, batch_first=batch_first, **where
        )
        self.linear1 = torch.nn.Linear(d_model, dim_feedforward, bias=bias, **where)
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = torch.nn.Linear(dim_feedforward, d_model, bias=bias, **where)
        self.norm_first = norm_first
        self.norm1 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
        self.norm2 = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
        self.dropout1 = torch.nn.Dropout(dropout)
        self.dropout2 = torch.nn.Dropout(dropout)
        self.activation = activation if callable(activation) else _ACTIVATIONS[activation]
        # What torch's own encoder asks before it hands its layers NestedTensors: not these.
        self.activation_relu_or_gelu = 0

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """torch.nn.TransformerEncoderLayer.forward; masks as in MultiheadAttention.forward."""

        def attend(x):
            return self.self_attn(
                *(x, x, x),
                attn_mask=src_mask,
                key_padding_mask=src_key_padding_mask,
                need_weights=False,
                is_causal=is_causal,
            )[0]

        if self.norm_first:
            branch = attend(self.norm1(src))
            x, total = self._add_norm(branch, src, self.norm2, self.dropout1)
            return total + self.dropout2(self._feed_forward(x))
        x, _ = self._add_norm(attend(src), src, self.norm1, self.dropout1)
        return self._add_norm(self._feed_forward(x), x, self.norm2, self.dropout2)[0]

    def _feed_forward(self, x):
        approximate = _gelu_form(self.activation)
        if approximate is None:
            x = self.activation(_product(self.linear1, x))
        elif _is_plain(self.linear1, torch.nn.Linear):
            product = linear(x, self.linear1.weight)
            x = gelu(product, approximate=approximate, bias=self.linear1.bias)
        else:
            x = gelu(self.linear1(x), approximate=approximate)
        return _product(self.linear2, self.dropout(x))

    def _add_norm(self, branch, residual, norm, dropout):
        """(norm(total), total) with total = residual + dropout(branch)."""
        fused = _is_plain(norm, LayerNorm, torch.nn.LayerNorm)
        if not (fused and _is_plain(dropout, torch.nn.Dropout)):
            total = residual + dropout(branch)
            return norm(total), total
        return add_layer_norm(
            # Under autocast products come in its dtype; as in torch, the sum is in residual's.
            branch.to(residual.dtype),
            residual,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=dropout.p if dropout.training else 0.0,
        )


def _is_plain(module: torch.nn.Module, *classes: type) -> bool:
    """Whether a call of `module` does what one of `classes` does, and nothing else sees it.

    A subclass may do something else: adapters are often subclasses, parametrized modules always.
    """
    if type(module) not in classes or "forward" in vars(module):
        return False
    forward = module._forward_pre_hooks or module._forward_hooks
    return not (forward or module._backward_pre_hooks or module._backward_hooks)


def _product(layer, x):
    if _is_plain(layer, torch.nn.Linear):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def _gelu_form(activation) -> str | None:
    """Which of gelu's approximations `activation` is; None if it is something else."""
    if activation is F.gelu:
        return "none"
    if isinstance(activation, torch.nn.Module) and _is_plain(activation, torch.nn.GELU, GELU):
        return activation.approximate
    return None


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder over layers of ours or of torch's.

    enable_nested_tensor and mask_check allow and guard torch's fast path through NestedTensors;
    there is none here, so padded rows come out as from torch's ordinary path, and not as zeros.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: torch.nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        super().__init__(
            encoder_layer, num_layers, norm, enable_nested_tensor=False, mask_check=mask_check
        )
        self.enable_nested_tensor = enable_nested_tensor

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """torch.nn.TransformerEncoder.forward.

        is_causal  a promise that mask is causal; None means no promise, where torch compares mask
                   with a causal one: the same output, by the way that stores the scores
        """
        for layer in self.layers:
            src = layer(
                src,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=bool(is_causal),
            )
        return src if self.norm is None else self.norm(src)
