"""The model benchmark: its gate, and that all contenders compute the same loss."""

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.models import bert_providers, bert_training
from benchmarks.models.bert_providers import Shape

CPU = torch.device("cpu")
SHAPE = Shape("tiny", 3, 24, True)
NAMES = ["hf_sdpa", "slim", "slim_padded", "slim_torch"]


def test_batch_has_the_padding_and_the_masks_it_says():
    batch = bert_providers.batch_of(Shape("tiny", 8, 128, True), CPU)
    assert batch.padding_saved == pytest.approx(0.4, abs=0.01)
    assert len(batch.masked_positions) == pytest.approx(0.15 * batch.num_tokens, rel=0.05)
    assert (batch.input_ids[batch.masked_positions] == bert_providers.MASK_ID).all()
    assert bert_providers.batch_of(Shape("tiny", 8, 128), CPU).padding_saved == 0


def test_gate_passes_every_contender():
    verdicts = bert_providers.gate(SHAPE, CPU, NAMES)
    assert verdicts == {"hf_sdpa": "baseline"} | dict.fromkeys(NAMES[1:], "pass")


def test_gate_refuses_a_model_that_differs(monkeypatch):
    right = bert_providers.ours_from

    def one_norm_off(theirs):
        model = right(theirs)
        with torch.no_grad():
            model.bert.layers[0].attention_norm.bias += 1e-3
        return model

    monkeypatch.setattr(bert_providers, "ours_from", one_norm_off)
    verdict = bert_providers.gate(SHAPE, CPU, ["slim"])["slim"]
    assert verdict.startswith("FAIL")


def test_rows_are_complete_and_a_red_gate_has_no_number():
    verdicts = {"hf_sdpa": "baseline", "slim": "pass", "slim_padded": "FAIL losses: error 1"}
    options = bert_training.parse(["--device", "cpu", "--seconds", "0", "--no-memory"])
    rows = bert_training.measure(SHAPE, "float32", list(verdicts), verdicts, options)
    by_name = {row["provider"]: row for row in rows}
    assert by_name["hf_sdpa"]["ratio"] == 1.0
    assert by_name["slim"]["loss"] == pytest.approx(by_name["hf_sdpa"]["loss"], rel=1e-5)
    assert by_name["slim"]["real_tokens"] == bert_providers.batch_of(SHAPE, CPU).num_tokens
    assert "ms" not in by_name["slim_padded"] and "ratio" not in by_name["slim_padded"]
