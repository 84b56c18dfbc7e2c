"""The attention half of attn_implementation="slimkernels"."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slimkernels.integrations._hf_mask import Pattern, packing_of, pattern_of
from slimkernels.ops._attention_variant import AttentionVariant
from slimkernels.ops.scaled_dot_product_attention import scaled_dot_product_attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """What transformers calls for attention, with its arguments: (B, L, H, D) and no weights.

    query, key, value  (B, H, L, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv); H a multiple of Hkv
    attention_mask     bool, True where a key is seen, or added to the scores; None for no mask, and
                       then is_causal, or module.is_causal, says whether a query sees later keys
    dropout            taken in training only
    s_aux              (H,): a score without a value for each head
    position_bias      added to the scores beside the mask
    cu_seq_lens_q      (sequences + 1,): without a mask, the tokens of all rows are these sequences
    sliding_window     how many keys a query sees back, itself counted: with cu_seq_lens_q only,
                       since every mask has its window in it
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            'attn_implementation="slimkernels" never stores attention\'s weights, so there are '
            'none to return: use model.set_attn_implementation("eager") for output_attentions=True'
        )
    query, key, value = _as_autocast((query, key, value))
    dropout = dropout if module.training else 0.0
    extras = {"softcap": softcap or None, "sinks": s_aux, "bias": position_bias}
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    pattern = pattern_of(attention_mask)
    boundaries = window = None
    if pattern is not None and not _fits(pattern, query, key):
        packing = packing_of(attention_mask)
        if packing is not None and query.shape[0] == 1 and query.shape[2] == len(packing.indices):
            boundaries, window = (packing.cu_seqlens,) * 2, pattern.window
        pattern = None
    elif pattern is not None and pattern.cu_seqlens is not None:
        boundaries, window = (pattern.cu_seqlens,) * 2, pattern.window
    elif cu_seq_lens_q is not None and attention_mask is None:
        boundaries = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        window = _window(sliding_window, is_causal)
    if boundaries is not None:
        return _ragged(query, key, value, boundaries, window, dropout, scaling, extras), None
    if _is_foreign(query, key):
        options = {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        options |= {"softcap": softcap} if softcap else {}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, **options
        )
    call = {"dropout_p": dropout, "scale": scaling, "enable_gqa": key.shape[1] != query.shape[1]}
    if pattern is not None:
        call["key_lengths"] = pattern.key_lengths
        extras |= {"window": pattern.window, "causal_offset": pattern.offset}
    elif attention_mask is None:
        # A single query is the newest one; of several the first stands at the first key.
        call["is_causal"] = query.shape[2] > 1 and is_causal
    elif attention_mask.dtype == torch.bool:
        call["attn_mask"] = attention_mask
    elif position_bias is None:
        call["attn_mask"] = _bias(attention_mask, query)
    else:
        extras["bias"] = position_bias + attention_mask
    y = scaled_dot_product_attention(query, key, value, variant=_variant(extras), **call)
    return y.transpose(1, 2).contiguous(), None


def _ragged(query, key, value, boundaries, window, dropout, scaling, extras):
    """(B, H, L, D) holding B * L tokens of some sequences, to (B, L, H, Dv)."""
    B, H, L, _ = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    y = scaled_dot_product_attention(
        *(q, k, v),
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=k.shape[1] != H,
        cu_seqlens=tuple(t.to(torch.int32) for t in boundaries),
        variant=_variant({**extras, "window": window}),
    )
    return y.view(B, L, H, -1)


def _fits(pattern: Pattern, query, key):
    """Whether the tensors are those that the mask was made for."""
    B, L, Lk = pattern.shape
    return query.shape[0] == key.shape[0] == B and query.shape[2] == L and key.shape[2] == Lk


def _window(sliding_window, is_causal):
    left = None if sliding_window is None else sliding_window - 1
    return left, 0 if is_causal else left


def _variant(extras) -> AttentionVariant | None:
    given = {name: value for name, value in extras.items() if value is not None}
    if given.get("window") == (None, None):
        del given["window"]
    if "window" not in given:  # which alone asks where a query stands
        given.pop("causal_offset", None)
    if "bias" in given:
        given["bias"] = given["bias"].contiguous()
    return AttentionVariant(**given) if given else None


def _bias(mask, query):
    """An added mask in a dtype that the op takes."""
    return mask if mask.dtype in (query.dtype, torch.float32) else mask.to(query.dtype)


def _is_foreign(query, key):
    """What torch's function does and ours does not: other devices, and one row for all keys."""
    return not (query.is_cpu or query.is_cuda) or query.shape[0] != key.shape[0]


def _as_autocast(tensors):
    """In autocast's dtype where it is on, as torch's own attention would be."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)
