"""The families' benchmark runs, gates what it measures, and makes a page of it."""

import pytest

pytest.importorskip("transformers", minversion="5.0")
from benchmarks import results
from benchmarks.models import families


def test_a_family_is_measured_and_shown(tmp_path):
    arguments = ["--quick", "--family", "DistilBERT", "--seconds", "0", "--no-compile"]
    assert families.main([*arguments, "--no-memory", "--out", str(tmp_path)]) == 0
    header, rows = results.read_csv(tmp_path / "families.csv")
    assert [row["provider"] for row in rows] == ["sdpa", "eager", "slim"] * 2
    assert all(float(row["ratio"]) > 0 for row in rows)
    assert {row["gate"] for row in rows if row["provider"] == "slim"} == {"pass"}
    (line,) = [s for s in families.page(header, rows).splitlines() if s.startswith("| DistilBERT")]
    assert "Stack" in line and line.count("x |") == 4
    again = [*arguments, "--no-memory", "--work", "training", "--renew", "--out", str(tmp_path)]
    assert families.main(again) == 0
    renewed = results.read_csv(tmp_path / "families.csv")[1]
    assert [row["work"] for row in renewed] == 3 * ["inference"] + 3 * ["training"]
    assert renewed[:3] == rows[:3] and renewed[3:] != rows[3:]


def test_a_family_that_fails_its_gate_has_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(families.family_models, "gate", lambda *_: ("FAIL of a test", "", ""))
    arguments = ["--quick", "--family", "DistilBERT", "--work", "inference", "--seconds", "0"]
    arguments += ["--no-compile", "--no-memory", "--out", str(tmp_path)]
    assert families.main(arguments) == 1
    _, rows = results.read_csv(tmp_path / "families.csv")
    (ours,) = [row for row in rows if row["provider"] == "slim"]
    assert ours["gate"] == "FAIL of a test" and not ours["ratio"]
