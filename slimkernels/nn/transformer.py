"""torch.nn's transformer layers and stacks of them (Vaswani et al. 2017), fused.

Where torch runs dropout, addition and norm one after another, a post-norm layer here runs
add_layer_norm once; the first linear layer's bias is added inside gelu's pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.nn._parts import activated_product, add_norm, is_plain, norm_of_sum, product
from slimkernels.nn._torchs_own import is_small, is_torchs
from slimkernels.nn.layer_norm import LayerNorm
from slimkernels.nn.multihead_attention import MultiheadAttention
from slimkernels.ops._checks import is_readable
from slimkernels.ops.linear import linear
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention

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
        _check_activation("TransformerEncoderLayer", activation)
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
        # A stack of torch's hands NestedTensors to a layer that was torch's.
        was_torchs = self.activation_relu_or_gelu and not self.training
        is_masked = src_mask is not None or src_key_padding_mask is not None
        if is_torchs(src) or was_torchs and not is_masked and is_small(src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x):
            return _attend(self.self_attn, x, x, src_mask, src_key_padding_mask, is_causal)

        if self.norm_first:
            branch = attend(self.norm1(src))
            x, total = add_norm(branch, src, self.norm2, self.dropout1)
            return total + self.dropout2(_feed_forward(self, x))
        x = norm_of_sum(attend(src), src, self.norm1, self.dropout1)
        return norm_of_sum(_feed_forward(self, x), x, self.norm2, self.dropout2)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer; parts and errors as in TransformerEncoderLayer."""

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
        _check_activation("TransformerDecoderLayer", activation)
        # Not torch's own __init__, for the reasons in TransformerEncoderLayer's.
        torch.nn.Module.__init__(self)
        where = {"device": device, "dtype": dtype}
        attention = dict(dropout=dropout, bias=bias, batch_first=batch_first, **where)
        self.self_attn = MultiheadAttention(d_model, nhead, **attention)
        self.multihead_attn = MultiheadAttention(d_model, nhead, **attention)
        self.linear1 = torch.nn.Linear(d_model, dim_feedforward, bias=bias, **where)
        self.dropout = torch.nn.Dropout(dropout)
        self.linear2 = torch.nn.Linear(dim_feedforward, d_model, bias=bias, **where)
        self.norm_first = norm_first
        for i in (1, 2, 3):
            norm = LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
            self.add_module(f"norm{i}", norm)
        for i in (1, 2, 3):
            self.add_module(f"dropout{i}", torch.nn.Dropout(dropout))
        self.activation = activation if callable(activation) else _ACTIVATIONS[activation]

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """torch.nn.TransformerDecoderLayer.forward; masks as in MultiheadAttention.forward."""

        def attend(x):
            return _attend(self.self_attn, x, x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def cross(x):
            masks = memory_mask, memory_key_padding_mask, memory_is_causal
            return _attend(self.multihead_attn, x, memory, *masks)

        if self.norm_first:
            x, total = add_norm(attend(self.norm1(tgt)), tgt, self.norm2, self.dropout1)
            x, total = add_norm(cross(x), total, self.norm3, self.dropout2)
            return total + self.dropout3(_feed_forward(self, x))
        x = norm_of_sum(attend(tgt), tgt, self.norm1, self.dropout1)
        x = norm_of_sum(cross(x), x, self.norm2, self.dropout2)
        return norm_of_sum(_feed_forward(self, x), x, self.norm3, self.dropout3)


def _check_activation(module, activation):
    if isinstance(activation, str) and activation not in _ACTIVATIONS:
        raise ValueError(
            f"{module}: activation must be 'relu', 'gelu' or a function; got {activation!r}"
        )


def _attend(attention, x, memory, mask, key_padding_mask, is_causal):
    return attention(
        *(x, memory, memory),
        attn_mask=mask,
        key_padding_mask=key_padding_mask,
        need_weights=False,
        is_causal=is_causal,
    )[0]


def _feed_forward(layer, x):
    x = activated_product(layer.linear1, layer.activation, x)
    return product(layer.linear2, layer.dropout(x))


class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder over layers of ours or of torch's.

    One that is made here gives padded rows as torch's ordinary path does, in evaluation, too, and
    enable_nested_tensor and mask_check are only kept. One that was torch's, with a path for
    evaluation that leaves padding out, still leaves it out, and gives zeros in padded rows.
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

        is_causal  a promise that mask is causal; None looks whether it is, on the CPU alone: a
                   mask elsewhere is read as it is, with the same output, so nobody waits
        """
        had_fast_path = getattr(self, "use_nested_tensor", False)  # missing in old pickles
        if had_fast_path and not self.training and is_small(src):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        is_causal = _is_causal(mask, is_causal)
        if mask is None and self._leaves_padding_out(src, src_key_padding_mask):
            y = self._without_padding(src, src_key_padding_mask)
            return y if self.norm is None else self.norm(y)
        for layer in self.layers:
            src = layer(
                src,
                src_mask=mask,
                src_key_padding_mask=src_key_padding_mask,
                is_causal=is_causal,
            )
        return src if self.norm is None else self.norm(src)

    def _leaves_padding_out(self, src, padding):
        """Whether torch's encoder would give zeros in the padded rows of this call.

        It also asks, waiting for the device, whether padding ends the rows: here, only on the CPU.
        """
        had_fast_path = getattr(self, "use_nested_tensor", False)
        if not had_fast_path or self.layers[0].training or torch.compiler.is_compiling():
            return False
        if padding is None or padding.dtype != torch.bool or is_torchs(src) or src.dim() != 3:
            return False
        # Under autocast on the CPU torch's path raises.
        is_autocast = src.is_cuda and torch.is_autocast_enabled("cuda")
        if is_autocast or not torch.backends.mha.get_fastpath_enabled():
            return False
        tensors = (src, *self.layers[0].parameters())
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return False
        is_looked_at = getattr(self, "mask_check", True) and is_readable(padding)
        return not is_looked_at or _ends_rows(padding)

    def _without_padding(self, src, padding):
        kept = ~padding
        fused = all(map(_is_plain_layer, self.layers))
        if not (fused and is_readable(padding)):
            for layer in self.layers:
                src = layer(src, src_key_padding_mask=padding)
            return src.masked_fill(padding.unsqueeze(-1), 0)
        lengths = kept.sum(1, dtype=torch.int32)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        x = src[kept]  # (N, C), N tokens in all
        for layer in self.layers:
            x = _unpadded_layer(layer, x, cu_seqlens)
        y = src.new_zeros(src.shape)
        y[kept] = x
        return y


def _ends_rows(padding):
    return not (padding[:, :-1] & ~padding[:, 1:]).any()


def _is_plain_layer(layer):
    """Whether _unpadded_layer does what a call of `layer` does."""
    attention = layer.self_attn
    if not (is_plain(layer, TransformerEncoderLayer) and is_plain(attention, MultiheadAttention)):
        return False
    is_packed = attention.batch_first and attention.in_proj_weight is not None
    return is_packed and not layer.norm_first and not attention.training


def _unpadded_layer(layer, x, cu_seqlens):
    """A post-norm layer in evaluation, of the sequences that lie one after another in x (N, C)."""
    attention = layer.self_attn
    qkv = linear(x, attention.in_proj_weight, attention.in_proj_bias)
    qkv = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim))  # (N, 3, H, D)
    y = scaled_dot_product_attention(*qkv.unbind(1), cu_seqlens=cu_seqlens)
    y = linear(y.flatten(-2), attention.out_proj.weight, attention.out_proj.bias)
    x = norm_of_sum(y, x, layer.norm1, layer.dropout1)
    return norm_of_sum(_feed_forward(layer, x), x, layer.norm2, layer.dropout2)


class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder over layers of ours or of torch's."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """torch.nn.TransformerDecoder.forward; tgt_is_causal as TransformerEncoder's is_causal."""
        tgt_is_causal = _is_causal(tgt_mask, tgt_is_causal)
        for layer in self.layers:
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
            )
        return tgt if self.norm is None else self.norm(tgt)


def _is_causal(mask: Tensor | None, is_causal: bool | None) -> bool:
    """The promise given, or whether mask is seen to be causal where looking costs nothing."""
    if is_causal is not None or mask is None or not is_readable(mask):
        return bool(is_causal)
    if mask.dim() != 2 or mask.shape[0] != mask.shape[1]:
        return False
    hidden = True if mask.dtype == torch.bool else -torch.inf
    return torch.equal(mask, torch.full_like(mask, hidden).triu(1))
