"""The attention half of attn_implementation="slimkernels"."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from slimkernels.integrations._hf_mask import Pattern, packing_of, pattern_of
from slimkernels.integrations._hf_recording import recorded
from slimkernels.nn._torchs_own import is_small
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
    if kwargs.get("output_attentions") or _are_recorded():
        raise ValueError(
            'attn_implementation="slimkernels" never stores attention\'s weights, so there are '
            'none to return: use model.set_attn_implementation("eager") for output_attentions=True'
        )
    dropout = dropout if module.training else 0.0
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    is_plain = cu_seq_lens_q is s_aux is None and not softcap
    if is_plain and (_is_foreign(query, key) or _is_small(query, attention_mask)):
        options = {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, **options
        )
    extras = {"softcap": softcap or None, "sinks": s_aux, "bias": position_bias}
    options = {"dropout_p": dropout, "scale": scaling}
    boundaries = None
    if attention_mask is not None:
        boundaries = _packed(attention_mask, query, key, extras)
    elif cu_seq_lens_q is not None:
        boundaries = cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        extras["window"] = _window(sliding_window, is_causal)
    if boundaries is not None:
        return _ragged(query, key, value, boundaries, options, extras), None
    options |= _masked(attention_mask, query, key, is_causal, extras)
    options |= {"enable_gqa": key.shape[1] != query.shape[1], "variant": _variant(extras)}
    y = scaled_dot_product_attention(query, key, value, **options)
    return y.transpose(1, 2).contiguous(), None


def _are_recorded() -> bool:
    """Whether a model collects attention's weights; some keep that from their attention."""
    return any("attentions" in name for name in recorded() or ())


def _packed(mask, query, key, extras) -> tuple[Tensor, Tensor] | None:
    """The boundaries of the sequences that are in one row, or in one since they were packed."""
    pattern = pattern_of(mask)
    if pattern is None:
        return None
    if _fits(pattern, query, key):
        boundaries = pattern.cu_seqlens
    else:
        packing = packing_of(mask)
        if packing is None or query.shape[0] != 1 or query.shape[2] != len(packing.indices):
            return None
        boundaries = packing.cu_seqlens
    extras["window"] = pattern.window
    return None if boundaries is None else (boundaries, boundaries)


def _masked(mask, query, key, is_causal, extras) -> dict:
    """Arguments of attention for a mask; what belongs to its variant goes into `extras`."""
    pattern = pattern_of(mask)
    if pattern is not None and _fits(pattern, query, key):
        extras |= {"window": pattern.window, "causal_offset": pattern.offset}
        return {"key_lengths": pattern.key_lengths}
    extras["window"] = None  # which a mask has in it
    if mask is None:
        # A single query is the newest one; of several the first stands at the first key.
        return {"is_causal": query.shape[2] > 1 and is_causal}
    if mask.dtype == torch.bool:
        return {"attn_mask": mask}
    if not mask.is_floating_point():
        raise ValueError(
            f"attention: attention_mask must be bool, True where a key is seen, or of floating "
            f"point, added to the scores; got {mask.dtype}"
        )
    if extras["bias"] is None:
        return {"attn_mask": _bias(mask, query)}
    extras["bias"] = extras["bias"] + mask
    return {}


def _ragged(query, key, value, boundaries, options, extras):
    """(B, H, L, D) holding B * L tokens of some sequences, to (B, L, H, Dv)."""
    B, H, L, _ = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    y = scaled_dot_product_attention(
        *(q, k, v),
        **options,
        enable_gqa=k.shape[1] != H,
        cu_seqlens=tuple(t.to(torch.int32) for t in boundaries),
        variant=_variant(extras),
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


def _is_small(query, mask):
    """Whether torch's function is as fast, unless the mask is that of tokens packed since."""
    if not is_small(query) or mask is None:
        return is_small(query)
    return mask.shape[0] == query.shape[0] and mask.shape[-2] == query.shape[2]


def _is_foreign(query, key):
    """What torch's function does and ours does not: other devices, and one row for all keys."""
    return not (query.is_cpu or query.is_cuda) or query.shape[0] != key.shape[0]
