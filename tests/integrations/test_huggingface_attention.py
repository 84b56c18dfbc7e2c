"""Attention and masks inside Hugging Face's models."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_families import FAMILIES, LENGTHS, REAL, B, L, tokens

from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")
from transformers import AttentionInterface
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as with_sinks
from transformers.models.llama.modeling_llama import eager_attention_forward as plain

import slimkernels.integrations.huggingface  # noqa: F401  registers attention
from slimkernels.integrations import _hf_attention, _hf_mask


def _three(model, batch, implementation="sdpa"):
    """Last hidden states: with slimkernels' attention, with `implementation`, and in float64.

    Eager's float64 is NaN where a query sees no key, which its masks then are not finite for.
    """
    results = []
    for name, dtype in (
        ("slimkernels", torch.float32),
        (implementation, torch.float32),
        (implementation, torch.float64),
    ):
        copied = copy.deepcopy(model).to(dtype)
        copied.set_attn_implementation(name)
        results.append(copied(**batch, use_cache=False).last_hidden_state.detach())
    return results


def _masks():
    batch = tokens()
    ids = batch["input_ids"]
    yield "right", batch, REAL
    yield "left", {n: t.flip(1) for n, t in batch.items()}, REAL.flip(1)
    yield "none", {"input_ids": ids}, torch.ones_like(REAL)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0], [*range(11)], [0] * 11])
    yield "packed", {"input_ids": ids, "position_ids": positions}, torch.ones_like(REAL)
    seen = torch.rand(B, 1, L, L, generator=torch.Generator().manual_seed(2)) < 0.7
    seen |= torch.eye(L, dtype=torch.bool)
    yield "own", {"input_ids": ids, "attention_mask": seen}, torch.ones_like(REAL)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind, batch, real", list(_masks()), ids=[kind for kind, *_ in _masks()])
def test_every_kind_of_mask_is_obeyed(kind, batch, real, window):
    family = FAMILIES["mistral"]
    model = FAMILIES["mistral"].make().model.eval()
    assert family.config["sliding_window"] == 4
    model.config.sliding_window = window
    if kind == "own":  # eager adds its mask
        batch = {**batch, "attention_mask": torch.where(batch["attention_mask"], 0.0, -1e9)}
        model.config.sliding_window = None
    three = _three(model, {n: t.clone() for n, t in batch.items()})
    assert_no_worse(*(t[real] for t in three))


def test_masks_carry_their_meaning():
    """Without it the numbers would be right, and nothing skipped."""
    patterns = []

    def record(module, query, key, value, attention_mask, **kwargs):
        patterns.append(_hf_mask.pattern_of(attention_mask))
        return attention(module, query, key, value, attention_mask, **kwargs)

    attention = _hf_attention.attention
    model = FAMILIES["mistral"].make().model.eval()
    model.set_attn_implementation("slimkernels")
    AttentionInterface.register("slimkernels", record)
    try:
        for _, batch, _ in list(_masks())[:4]:
            model(**batch, use_cache=False)
    finally:
        AttentionInterface.register("slimkernels", attention)
    right, left, none, packed = patterns[::2]
    assert right.window == (3, 0) and right.lengths == LENGTHS
    assert left is None  # padding on the left is no length
    assert none.window == (3, 0) and none.lengths is None
    assert packed.cu_seqlens.tolist() == [0, 4, 10, 11, 22, *range(23, 34)]


def test_sequences_named_by_cu_seq_lens_see_only_themselves():
    model = FAMILIES["llama"].make().model.eval()
    ids = tokens()["input_ids"]
    boundaries = torch.tensor([0, 4, 11], dtype=torch.int32)
    positions = torch.tensor([[*range(4), *range(7)]])
    names = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    models = model, copy.deepcopy(model).double()
    options = {"position_ids": positions, "use_cache": False}
    eager, truth = (m(ids[:1], **options).last_hidden_state for m in models)
    alone = (m(ids[:1, :4]).last_hidden_state for m in models)
    model.set_attn_implementation("slimkernels")
    actual = model(ids[:1], position_ids=positions, **names).last_hidden_state
    assert_no_worse(actual, eager, truth)
    assert_no_worse(actual[:, :4], *alone)


def test_another_mask_interface_gets_its_own_mask(monkeypatch):
    def sdpa_mask(batch_size, cache_position, kv_length, kv_offset=0):
        raise NotImplementedError

    assert _hf_mask.mask_function() is _hf_mask.mask
    monkeypatch.setattr(_hf_mask.masking_utils, "sdpa_mask", sdpa_mask)
    assert _hf_mask.mask_function() is sdpa_mask


def _heads(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def _module(**attributes):
    module = torch.nn.Module()
    for name, value in {"num_key_value_groups": 2, "is_causal": True, **attributes}.items():
        setattr(module, name, value)
    return module.eval()


def test_sinks_softcap_and_position_bias():
    mask = torch.zeros(2, 1, 5, 7).masked_fill(torch.rand(2, 1, 5, 7) < 0.3, -1e9)
    sinks = torch.randn(4)
    module = _module(sinks=sinks)
    truth = with_sinks(_module(sinks=sinks.double()), *_heads(torch.float64), mask.double(), 0.3)[0]
    eager = with_sinks(module, *_heads(), mask, 0.3)[0]
    ours = _hf_attention.attention(module, *_heads(), mask, scaling=0.3, s_aux=sinks)[0]
    assert_no_worse(ours, eager, truth)

    bias = torch.randn(1, 4, 5, 7)
    eager = plain(_module(), *_heads(), mask + bias, 0.3)[0]
    truth = plain(_module(), *_heads(torch.float64), mask.double() + bias, 0.3)[0]
    for m in (mask, mask == 0):
        ours = _hf_attention.attention(_module(), *_heads(), m, scaling=0.3, position_bias=bias)[0]
        assert_no_worse(ours, eager, truth)


def test_rows_that_see_nothing():
    """0 under a mask of bools, the mean of the values under one of the lowest number."""
    query, key, value = _heads()
    seen = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    seen[:, :, 2] = False
    y = _hf_attention.attention(_module(), query, key, value, seen)[0]
    assert (y[:, 2] == 0).all() and (y[:, 1] != 0).all()
    added = torch.zeros(2, 1, 5, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    y = _hf_attention.attention(_module(), query, key, value, added)[0]
    eager = plain(_module(), query, key, value, added, 8**-0.5)[0]
    mean = value.double().repeat_interleave(2, 1).mean(2)
    assert_no_worse(y[:, 2], eager[:, 2], mean)


def test_a_cache_longer_than_the_prompt_and_dropout_outside_training():
    y = _hf_attention.attention(_module(), *_heads(), None, dropout=0.5)[0]
    causal = torch.full((5, 7), -torch.inf).triu(1)[None, None]
    eager, truth = (
        plain(_module(), *_heads(dtype), causal.to(dtype), 8**-0.5)[0]
        for dtype in (torch.float32, torch.float64)
    )
    assert_no_worse(y, eager, truth)


@pytest.mark.parametrize("name", ["bert-mlm", "gpt2"])  # GPT-2 does not tell its attention
def test_attention_weights_are_refused(name):
    model = FAMILIES[name].make()
    model.set_attn_implementation("slimkernels")
    with pytest.raises(ValueError, match='set_attn_implementation."eager".'):
        model(**tokens(), output_attentions=True)


def test_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="attention_mask must be bool.*got torch.int64"):
        _hf_attention.attention(_module(), *_heads(), torch.ones(2, 1, 5, 7, dtype=torch.int64))


def test_sinks_are_never_dropped():
    query, key, value = _heads()
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):  # which broadcasts not
        _hf_attention.attention(_module(), query[:1], key, value, None, s_aux=torch.randn(4))


def test_a_mask_that_is_written_loses_its_pattern():
    sequence = torch.ones(2, 7, dtype=torch.bool)
    mask = _hf_mask.mask(2, 7, 7, attention_mask=sequence.tril(), allow_is_causal_skip=False)
    assert _hf_mask.pattern_of(mask) is not None
    mask[:, :, 3] = False
    assert _hf_mask.pattern_of(mask) is None
