"""Logits of Hugging Face's models that are computed when somebody reads them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf_families import FAMILIES, REAL, B, L, V, masked, tokens
from module_cases import assert_model_no_worse

import slimkernels

pytest.importorskip("transformers", minversion="5.0")
from slimkernels.integrations import huggingface
from slimkernels.integrations._hf_logits import LazyLogits


def test_logits_are_computed_when_read(replaced):
    model = replaced.train()
    output = model(**masked())
    logits = output.logits
    assert isinstance(logits, LazyLogits) and logits.shape == (B, L, V)
    assert logits._source.value is None, "the loss needed them"
    expected = model.cls(model.bert(**tokens()).last_hidden_state).detach() + 0
    assert type(expected) is torch.Tensor
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    assert logits.tolist() == expected.tolist()
    assert torch.equal(logits.detach().float().cpu(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(logits.detach())), expected)
    assert f"{logits[0, 0, 0].item():.6f}" == f"{expected[0, 0, 0].item():.6f}"

    out = model(**masked())
    out.loss.backward()
    with torch.no_grad():
        model.cls.predictions.decoder.weight.mul_(2)
    with pytest.raises(RuntimeError, match="read them before it"):
        out.logits.argmax()
    huggingface.keep_logits(model)
    assert type(model(**masked()).logits) is torch.Tensor
    slimkernels.restore(model)


@pytest.mark.parametrize("name", ["distilbert", "gpt2", "t5", "bart", "whisper", "deberta-v2"])
def test_losses_do_without_logits(name):
    family = FAMILIES[name]
    model = family.make().train()
    slimkernels.replace(model)
    output = model(**family.inputs())
    assert output.logits._source.value is None and output.loss.isfinite()


def _own_loss(logits):
    return logits.log_softmax(-1)[REAL].square().mean()


def _written(logits):
    logits[..., 3] = -5.0
    return torch.nn.functional.cross_entropy(logits.view(-1, V), masked()["labels"].view(-1))


def _hooked(logits):
    logits.register_hook(lambda gradient: 2 * gradient)
    return torch.nn.functional.cross_entropy(logits.view(-1, V), masked()["labels"].view(-1))


@pytest.mark.parametrize("loss", [_own_loss, _written, _hooked])
def test_gradients_flow_through_logits_that_are_read(bert, replaced, loss):
    results = []
    for model in (replaced, copy.deepcopy(bert), copy.deepcopy(bert).double()):
        value = loss(model.train()(**tokens()).logits)
        value.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        results.append({"loss": value.detach()} | gradients)
    assert_model_no_worse(*results)


def test_logits_written_after_they_were_reshaped_are_refused(replaced):
    logits = replaced.train()(**tokens()).logits
    flat = logits.view(-1, V)
    logits[..., 3] = -5.0
    with pytest.raises(RuntimeError, match="make those after the writing"):
        torch.nn.functional.cross_entropy(flat, masked()["labels"].view(-1))
