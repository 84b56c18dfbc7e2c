"""The benchmark of sentence encoding runs, and its gate closes."""

import pytest
import torch

pytest.importorskip("transformers")
from benchmarks import results  # noqa: E402
from benchmarks.models import encoder_inference, encoder_peers  # noqa: E402


def test_quick_run_writes_rows_that_passed(tmp_path):
    names = ["hf_sdpa", "slim_replace"]
    chosen = [word for name in names for word in ("--provider", name)]
    options = ["--quick", "--seconds", "0", "--out", str(tmp_path), *chosen]
    assert encoder_inference.main(options) == 0
    _, rows = results.read_csv(tmp_path / "encoder_inference.csv")
    assert [row["provider"] for row in rows] == names
    assert [row["gate"] for row in rows] == ["not gated", "pass"]
    assert all(float(row["cosine"]) > 0.999999 and float(row["ratio"]) > 0 for row in rows)


def test_gate_closes():
    torch.manual_seed(0)
    truth = torch.randn(2, 5, 8, dtype=torch.float64)
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])}
    wrong = truth.float()
    wrong[1, 1] += 1e-3
    verdict, _ = encoder_peers.verdict("slim_replace", wrong, batch, truth, truth.float())
    assert verdict.startswith("FAIL")
    wrong = truth.float()
    wrong[1, 2] += 1  # padding
    verdict, cosine = encoder_peers.verdict("slim_replace", wrong, batch, truth, truth.float())
    assert verdict == "pass" and cosine > 0.999999
