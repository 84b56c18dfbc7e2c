"""torch.nn.MultiheadAttention (Vaswani et al. 2017) on the library's attention.

Two ways through, by what is asked for:

    need_weights=False   scaled_dot_product_attention, whose scores are never stored
    need_weights=True    products with softmax between: the scores, O(Tq * Tk), are stored, as in
                         torch
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.nn._torchs_own import is_small, is_torchs
from slimkernels.ops._attention_variant import AttentionVariant
from slimkernels.ops.linear import linear
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention
from slimkernels.ops.softmax import softmax


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention, in eval as in training; torch's own path takes small calls.

    Errors  ValueError for add_bias_kv and add_zero_attn, which are not implemented, for widths
            that do not fit the heads, and in forward for shapes that do not fit each other
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        dropout=0.0,
        bias=True,
        add_bias_kv=False,
        add_zero_attn=False,
        kdim=None,
        vdim=None,
        batch_first=False,
        device=None,
        dtype=None,
    ) -> None:
        for name, asked in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if asked:
                raise ValueError(f"MultiheadAttention: {name} is not implemented")
        if num_heads > 0 and embed_dim % num_heads:
            raise ValueError(
                f"MultiheadAttention: embed_dim must be a multiple of num_heads {num_heads}; "
                f"got {embed_dim}"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, weights), as torch.nn.MultiheadAttention.forward.

        query                 (Tq, B, C), or (B, Tq, C) if batch_first, or (Tq, C)
        key, value            likewise with Tk tokens of width kdim and vdim
        key_padding_mask      (B, Tk) or (Tk,): bool, True for keys to ignore; or floating, added,
                              -inf being the same as True
        need_weights          also return the weights, which takes the way that stores them
        attn_mask             (Tq, Tk) or (B * H, Tq, Tk): bool, True for pairs to ignore; or
                              floating, added to the scaled scores, -inf being the same as True
        average_attn_weights  weights are the mean over heads (B, Tq, Tk), else (B, H, Tq, Tk)
        is_causal             as in torch a promise that attn_mask is causal, which may then not
                              be read; unlike torch, enough without attn_mask
        Caution               whether a bool key_padding_mask ends every row is looked at on the
                              CPU; elsewhere valid keys are moved to the front, so nobody waits
        """
        if is_torchs(query) or is_torchs(key) or is_torchs(value):
            masks = dict(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
            flags = dict(average_attn_weights=average_attn_weights, is_causal=is_causal)
            return super().forward(query, key, value, need_weights=need_weights, **masks, **flags)
        _check(self, query, key, value, key_padding_mask, attn_mask)
        is_masked = is_causal or key_padding_mask is not None or attn_mask is not None
        if not (is_masked or self.training) and query is key is value and is_small(query):
            flags = dict(need_weights=need_weights, average_attn_weights=average_attn_weights)
            return super().forward(query, key, value, **flags)
        layout = "flat" if query.dim() == 2 else "batch" if self.batch_first else "sequence"
        q, k, v = (self._heads(t, layout) for t in self._project(query, key, value))
        if layout == "flat" and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, q.shape[:2])  # (B, H, Tq, Tk)
        if need_weights:
            is_causal = is_causal and attn_mask is None
            y, weights = self._attend_storing(q, k, v, key_padding_mask, attn_mask, is_causal)
        else:
            attn_mask = None if is_causal else attn_mask
            y = self._attend(q, k, v, key_padding_mask, attn_mask, is_causal)
        if layout == "flat":
            y = y.squeeze(0).transpose(0, 1)  # (Tq, H, D)
        else:
            y = y.transpose(1, 2) if layout == "batch" else y.permute(2, 0, 1, 3)
        y = linear(y.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if not need_weights:
            return y, None
        weights = weights.mean(1) if average_attn_weights else weights
        return y, weights.squeeze(0) if layout == "flat" else weights

    def _project(self, query, key, value):
        """Projected query, key and value, by as few products as their being the same allows."""
        C, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return linear(query, self.in_proj_weight, bias).chunk(3, -1)
        elif key is value:
            weights = self.in_proj_weight.split([C, 2 * C])
            biases = (None, None) if bias is None else bias.split([C, 2 * C])
            return linear(query, weights[0], biases[0]), *linear(key, weights[1], biases[1]).chunk(
                2, -1
            )
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(linear(*call) for call in zip(inputs, weights, biases, strict=True))

    def _heads(self, x, layout):
        """(B, H, T, D), a view, of what a projection gave."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if layout == "flat":
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if layout == "batch" else x.permute(1, 2, 0, 3)

    def _attend(self, q, k, v, padding, mask, is_causal):
        """The way that stores no scores."""
        key_lengths = None
        masks = [] if mask is None else [mask]
        if padding is not None and not padding.is_floating_point():
            key_lengths = (~padding).sum(1, dtype=torch.int32)
            if not _ends_rows(padding, key_lengths):
                if is_causal or mask is not None:
                    key_lengths = None
                else:  # attention does not care in which order its keys come
                    order = padding.to(torch.uint8).argsort(dim=1, stable=True)
                    order = order[:, None, :, None].expand_as(k)
                    k, v = k.gather(2, order), v.gather(2, order)
        if padding is not None and key_lengths is None:
            masks.append(padding[:, None, None, :])
        hidden, bias = None, None
        for m in masks:
            if m.is_floating_point():  # often float32, whatever the module's dtype
                m = m if m.dtype == torch.float32 else m.to(q.dtype)
                bias = m if bias is None else bias + m
            else:
                hidden = m if hidden is None else hidden | m
        return scaled_dot_product_attention(
            *(q, k, v),
            attn_mask=None if hidden is None else ~hidden,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            key_lengths=key_lengths,
            variant=AttentionVariant(bias=bias),
        )

    def _attend_storing(self, q, k, v, padding, mask, is_causal):
        """The output, and the weights (B, H, Tq, Tk) as they were used, dropout included."""
        if padding is not None:
            padding = padding[:, None, None, :]
        scores, scale, allowed = q @ k.transpose(-1, -2), self.head_dim**-0.5, None
        for m in (m for m in (padding, mask) if m is not None):
            if m.is_floating_point():
                m = m.to(scores.dtype)  # masks are often float32 whatever the module
                scores, scale = scores * scale + m, 1.0
                # Left to softmax, a row of nothing but -inf would be NaN; as in torch, it is zero.
                sees = m != -math.inf
            else:
                sees = ~m
            allowed = sees if allowed is None else allowed & sees
        p = softmax(scores, -1, scale=scale, mask=allowed, is_causal=is_causal)
        p = F.dropout(p, self.dropout, self.training)
        return p @ v, p


def _ends_rows(padding: Tensor, key_lengths: Tensor) -> bool:
    """Whether padding is known to stand only at the ends of rows, so that lengths say it all."""
    if padding.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    places = torch.arange(padding.shape[1])
    return torch.equal(padding, places >= key_lengths[:, None])


def _check(module, query, key, value, padding, mask):
    """Every shape that the ways through rely on."""
    widths = {"query": module.embed_dim, "key": module.kdim, "value": module.vdim}
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.dim() != query.dim() or x.dim() not in (2, 3) or x.shape[-1] != widths[name]:
            raise ValueError(
                f"MultiheadAttention: {name} must have 3 dimensions, or 2 unbatched, alike in all, "
                f"and a last one of {widths[name]}; got {tuple(x.shape)}"
            )
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"MultiheadAttention: value must have as many tokens as key {tuple(key.shape)}; "
            f"got {tuple(value.shape)}"
        )
    time, batch = (1, 0) if module.batch_first and query.dim() == 3 else (0, 1)
    Tq, Tk = query.shape[time], key.shape[time]
    B = query.shape[batch] if query.dim() == 3 else 1
    if query.dim() == 3 and key.shape[batch] != B:
        raise ValueError(
            f"MultiheadAttention: key must have query's batch of {B}; got {key.shape[batch]}"
        )
    shapes = ((B, Tk) if query.dim() == 3 else (Tk,),)
    _check_mask("key_padding_mask", padding, shapes)
    _check_mask("attn_mask", mask, ((Tq, Tk), (B * module.num_heads, Tq, Tk)))


def _check_mask(name, mask, shapes):
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"MultiheadAttention: {name} must be bool or floating; got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        raise ValueError(
            f"MultiheadAttention: {name} must have shape {' or '.join(map(str, shapes))}; "
            f"got {tuple(mask.shape)}"
        )
