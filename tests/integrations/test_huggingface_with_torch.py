"""A swapped model of Hugging Face's under what torch and PEFT do to models."""

from __future__ import annotations

import copy
import multiprocessing

import pytest
import torch
from distributed_cases import CASES, RANKS, alone, child, in_group
from hf_families import FAMILIES, LENGTHS, L, masked, tokens
from module_cases import assert_model_no_worse
from torch.nn.utils.parametrizations import weight_norm

import slimkernels
from slimkernels.testing import assert_no_worse

pytest.importorskip("transformers", minversion="5.0")

REAL = torch.arange(L) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(scope="module")
def bert():
    """Not to be changed."""
    return FAMILIES["bert-mlm"].make().train()


@pytest.fixture
def replaced(bert):
    return slimkernels.replace(bert, inplace=False).model


def _results(model):
    """The loss and the gradients of a step, by name."""
    model.zero_grad()
    loss = model(**masked()).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


def test_data_parallel_and_sharded(tmp_path):
    """DDP and FSDP2 in two processes, swapped before and after; each rank has its own batch.

    One test, because the other process takes seconds to start.
    """
    other = multiprocessing.get_context("spawn").Process(target=child, args=(1, tmp_path / "meet"))
    other.start()
    try:
        families = dict.fromkeys(family for family, *_ in CASES)
        expected = {
            family: [alone(family, dtype)[0] for dtype in (torch.float32, torch.float64)]
            for family in families
        }
        actual = in_group(0, tmp_path / "meet")
        other.join(60)
        assert other.exitcode == 0 and RANKS == 2
    finally:
        other.kill()
    counts = {}
    for case in CASES:
        if isinstance(actual[case], Exception):
            raise AssertionError(case) from actual[case]
        counts.setdefault(case[0], set()).add(actual[case].pop("swapped"))
        assert actual[case].pop("packed") == 2, case  # one a step
        assert_model_no_worse(actual[case], *expected[case[0]])
    assert all(len(each) == 1 and min(each) > 8 for each in counts.values()), counts


@pytest.mark.parametrize("name", ["bert-mlm", "llama"])
def test_exports(name):
    model = FAMILIES[name].make().eval()
    options = {"use_cache": False} if name == "llama" else {}
    double = copy.deepcopy(model).double()
    batch = tokens()
    eager, truth = (m(**batch, **options).logits.detach() for m in (model, double))
    slimkernels.replace(model)
    program = torch.export.export(model, (), batch | options)
    assert any("slimkernels" in str(node.target) for node in program.graph.nodes)
    actual = program.module()(**batch, **options).logits.detach()
    assert_no_worse(actual[REAL], eager[REAL], truth[REAL])


def test_made_on_the_meta_device(bert):
    with torch.device("meta"):
        model = type(bert)(copy.deepcopy(bert.config))
    assert slimkernels.replace(model).swapped
    assert model(tokens()["input_ids"].to("meta")).logits.is_meta
    model.to_empty(device="cpu")
    model.load_state_dict(bert.state_dict())
    for name, buffer in bert.named_buffers():  # some are in no state_dict
        model.get_buffer(name).copy_(buffer)
    model.tie_weights()
    double = copy.deepcopy(bert).double()
    assert_model_no_worse(*map(_results, (model, copy.deepcopy(bert), double)))


def test_grad_scaler_steps(replaced):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(replaced.parameters(), lr=0.02)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.float16):
            loss = replaced(**masked()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0] and scaler.get_scale() == 256.0


def test_parametrized_parts_are_left_and_the_rest_is_right(bert):
    model = copy.deepcopy(bert)
    layer = model.bert.encoder.layer[0]
    parts = layer.output.LayerNorm, layer.intermediate.dense, model.cls.predictions.transform.dense
    for part in parts:
        weight_norm(part)
    eager, truth = _results(model), _results(copy.deepcopy(model).double())
    eager = {name: t.clone() for name, t in eager.items()}
    report = slimkernels.replace(model)
    left = {row.path for row in report.left if row.detail.startswith("parametrized")}
    assert left == {name for name, module in model.named_modules() if module in parts}
    assert_model_no_worse(_results(model), eager, truth)


@pytest.mark.parametrize("first", ["replace", "peft"])
def test_lora(bert, first):
    peft = pytest.importorskip("peft")

    def adapted(model):
        config = peft.LoraConfig(r=4, target_modules=["query", "dense"], lora_dropout=0.0)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at the start, and A has no gradient then
                torch.nn.init.normal_(p, std=0.1)
        return model.train()

    model = copy.deepcopy(bert)
    if first == "replace":
        slimkernels.replace(model)
    model = adapted(model)
    if first == "peft":
        assert slimkernels.replace(model).swapped
    eager = adapted(copy.deepcopy(bert))
    truth = copy.deepcopy(eager).double()
    assert_model_no_worse(*map(_results, (model, eager, truth)))
