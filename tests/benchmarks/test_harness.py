"""The benchmark harness: what it refuses to show, how it takes turns, and what it writes."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import slimkernels
from benchmarks import harness, provenance, results, run, timing
from benchmarks.harness import Benchmark, Case, Provider

CPU = torch.device("cpu")
BUDGET = timing.Budget(seconds=0.0, least=3, most=3, warm_up=1)


def layer_norm_benchmark(**changes) -> Benchmark:
    declared = {
        "op": "layer_norm",
        "shapes": {"cpu": [(9, 33)]},
        "inputs": lambda shape, dtype, device: (
            torch.randn(shape, device=device).to(dtype),
            *torch.randn(2, shape[-1], device=device).to(dtype).unbind(),
        ),
        "eager": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        "call": lambda x, weight, bias: ((x, x.shape[-1:], weight, bias), {}),
        "bytes_forward": lambda M, N, *, s: 2 * M * N * s,
        "bytes_backward": lambda M, N, *, s: 3 * M * N * s,
    }
    return Benchmark(**(declared | changes))


def case_of(benchmark: Benchmark, dtype=torch.float32) -> Case:
    return Case(benchmark, benchmark.shapes["cpu"][0], dtype, benchmark.variants[0], CPU)


@pytest.fixture(scope="module")
def roofs():
    return harness.Roofs(CPU)


def measured(case: Case, roofs, *others: Provider) -> dict[str, list[dict]]:
    eager = Provider("eager", case.benchmark.eager, gate="baseline")
    rows = harness.measure(case, roofs, BUDGET, [eager, *others])
    return {p.name: [r for r in rows if r["provider"] == p.name] for p in (eager, *others)}


def wrong_forward(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias) * 1.001


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return 0.5 * dy


def wrong_gradient(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, _HalfGradient.apply(bias))


@pytest.mark.parametrize("wrong, named", [(wrong_forward, "output"), (wrong_gradient, "gradient")])
def test_no_number_for_a_wrong_provider(roofs, wrong, named):
    rows = measured(case_of(layer_norm_benchmark()), roofs, Provider("wrong", wrong))["wrong"]
    assert len(rows) == 1
    assert rows[0]["gate"].startswith(f"FAIL {named}")
    assert not {"ms", "ratio", "gb_per_s"} & rows[0].keys()


def test_a_provider_that_cannot_run_says_so(roofs):
    def broken(x, weight, bias):
        return x @ x

    row = measured(case_of(layer_norm_benchmark()), roofs, Provider("broken", broken))["broken"][0]
    assert row["gate"].startswith("FAIL could not run") and "ms" not in row


def test_a_right_provider_has_all_its_numbers(roofs):
    case = case_of(layer_norm_benchmark())

    def ours(x, weight, bias):
        return slimkernels.layer_norm(x, x.shape[-1:], weight, bias, backend="torch")

    rows = measured(case, roofs, Provider("torch", ours))["torch"]
    assert [row["part"] for row in rows] == ["inference", "forward", "backward", "both"]
    for row, tensors in zip(rows, (2, 2, 3, 5), strict=True):
        assert row["gate"] == "pass" and row["turns"] == 3
        assert row["p20_ms"] <= row["ms"] <= row["p80_ms"]
        rate = tensors * 9 * 33 * 4 / (1e6 * row["ms"])
        assert math.isclose(row["gb_per_s"], rate)
        assert math.isclose(row["percent_of_roof"], 100 * rate / roofs.copy)


def test_a_losing_row_stays_in(roofs, tmp_path):
    case = case_of(layer_norm_benchmark())

    def slow(x, weight, bias):
        for _ in range(50):
            x.detach().sort()
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    rows = [row for rows in measured(case, roofs, Provider("slow", slow)).values() for row in rows]
    results.write_csv(tmp_path / "op.csv", {}, rows)
    kept = [row for row in results.read_csv(tmp_path / "op.csv")[1] if row["provider"] == "slow"]
    assert len(kept) == 4 and float(kept[3]["ratio"]) < 1


def test_dropout_is_gated_by_the_reference_with_the_same_seed():
    benchmark = layer_norm_benchmark(
        op="add_layer_norm",
        call=lambda x, weight, bias, *, dropout_p: (
            (x, x, x.shape[-1:], weight, bias),
            {"dropout_p": dropout_p},
        ),
        eager=lambda x, weight, bias, *, dropout_p: None,  # draws another mask: not compared
        variants=({"dropout_p": 0.5},),
        bytes_forward=lambda M, N, *, s, dropout_p: 4 * M * N * s,
        bytes_backward=lambda M, N, *, s, dropout_p: 5 * M * N * s,
    )
    gate = harness.Gate(case_of(benchmark))

    def ours(*inputs, dropout_p=0.5):
        return benchmark.ours(*inputs, backend="torch", dropout_p=dropout_p)

    def another_mask(*inputs):
        torch.rand(3)
        return ours(*inputs)

    assert gate.check(Provider("right", ours)) == "pass"
    assert gate.check(Provider("undropped", lambda *i: ours(*i, dropout_p=0.0))).startswith("FAIL")
    assert gate.check(Provider("another mask", another_mask)).startswith("FAIL")
    assert gate.check(Provider("compiled", ours)).startswith("not comparable")


def test_a_refusal_is_shown_in_the_row(roofs, monkeypatch):
    benchmark = layer_norm_benchmark()
    op = harness.dispatch.OPS["layer_norm"]

    class Refuses:
        @staticmethod
        def unsupported(*args):
            return "rows this short run faster in eager PyTorch"

    monkeypatch.setitem(op.modules, "cpu", Refuses)
    monkeypatch.setitem(op.modules, "triton", "there is no GPU")
    providers = list(harness.providers_of(case_of(benchmark), compiled=False))
    assert [p.name for p in providers] == ["eager", "cpu", "torch"]
    rows = harness.measure(case_of(benchmark), roofs, BUDGET, providers)
    notes = {row["provider"]: row["note"] for row in rows}
    assert notes["cpu"] == "delegates to eager: rows this short run faster in eager PyTorch"
    assert {row["provider"] for row in rows if "ms" in row} == {"eager", "torch"}


def test_providers_take_turns():
    calls = []

    def provider(name):
        def once():
            calls.append(name)
            return {"both": (1.0, 1.0)}

        return once

    budget = timing.Budget(seconds=0.0, least=3, most=9, warm_up=2)
    samples = timing.interleave({n: provider(n) for n in "abc"}, budget)
    assert "".join(calls[:6]) == "aabbcc"
    assert [sorted(calls[i : i + 3]) for i in (6, 9, 12)] == 3 * [["a", "b", "c"]]
    assert len(calls) == 15
    assert all(len(parts["both"].wall) == 3 for parts in samples.values())


def test_a_provider_that_slows_the_next_slows_all_of_them():
    """As one does that leaves a cold cache; an order that only rotates lets one pay for it."""
    last = ""

    def provider(name):
        def once():
            nonlocal last
            slowed, last = last == "c", name
            return {"both": (2.0 if slowed else 1.0, 0.0)}

        return once

    budget = timing.Budget(seconds=0.0, least=300, most=300, warm_up=2)
    samples = timing.interleave({n: provider(n) for n in "abc"}, budget)
    slowed = {name: sum(w == 2 for w in parts["both"].wall) for name, parts in samples.items()}
    assert all(60 < slowed[name] < 190 for name in "ab"), slowed


def test_statistics():
    assert timing.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == (3.5, 2.0, 5.0)
    assert timing.quantiles([7.0]) == (7.0, 7.0, 7.0)
    # By turns: a machine that gets slower during the run does not change the ratio.
    assert timing.speedup([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 2.0


def test_bytes_or_flops_not_both():
    with pytest.raises(ValueError, match="bytes or flops"):
        layer_norm_benchmark(flops_forward=lambda M, N, *, s: 1)


def test_csv_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "op.csv"
    rows = [{"op": "a", "ms": 1.23456}, {"op": "b", "note": "x, y"}]
    results.write_csv(path, {"device": "this\none"}, rows)
    header, read = results.read_csv(path)
    assert header == {"device": "this one"}
    assert read == [{"op": "a", "ms": "1.235", "note": ""}, {"op": "b", "ms": "", "note": "x, y"}]

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write_csv(path, {}, [{"op": "c"}])
    assert results.read_csv(path) == (header, read)
    assert [p.name for p in path.parent.iterdir()] == ["op.csv"]


def test_provenance_says_where_and_what():
    facts = provenance.provenance(CPU, "python -m benchmarks.run layer_norm")
    needed = ("device", "cpu", "threads", "torch", "triton", "commit", "date", "command")
    assert all(facts[name] for name in needed)
    assert "load average" in facts and facts["torch"] == torch.__version__


def test_command_names_no_place_of_this_machine():
    argv = [str(Path(run.__file__)), "softmax", "--out", "/some/private/place"]
    assert provenance.command_line(argv) == "python -m benchmarks.run softmax --out place"


def test_every_op_has_a_benchmark_that_is_right(roofs):
    names = run.op_names()
    assert set(harness.dispatch.OPS) <= set(names), "an op has no benchmark declaration"
    for name in names:
        benchmark = importlib.import_module(f"benchmarks.ops.bench_{name}").BENCHMARK
        assert benchmark.op == name or name.startswith("attention_")
        assert benchmark.shapes["cpu"] and benchmark.shapes["cuda"]
        for variant in benchmark.variants:
            shape = benchmark.shapes["cpu"][0]
            assert benchmark.work("both", shape, 4, variant) > 0


def test_provenance_says_which_tiles_attention_has(tmp_path, monkeypatch):
    tiles = pytest.importorskip("slimkernels.backends.triton._attention_tiles")
    monkeypatch.setattr(tiles, "user_table", lambda name: tmp_path / "own.json")
    assert provenance.attention_tiles("Some GPU") == "the package's for every GPU"
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    table = {"half": {"plain": {"dq": {"64": [64, 64, 4, 2], "128": [64, 32, 4, 2]}}}}
    tiles.write_table(tmp_path / "some-gpu.json", table | {"made": {"date": "2026-11-25"}})
    said = provenance.attention_tiles("Some GPU")
    assert said == "the package's for this GPU: 2 entries of 2026-11-25"
    tiles.write_table(tmp_path / "own.json", table)
    said = provenance.attention_tiles("Some GPU")
    assert said == "the user's own: 2 entries of an unknown day"


def test_run_writes_a_file_with_its_provenance(tmp_path, capsys):
    arguments = ["layer_norm", "--device", "cpu", "--dtype", "float32", "--quick"]
    arguments += ["--no-compile", "--seconds", "0", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    header, rows = results.read_csv(tmp_path / "layer_norm.csv")
    assert header["complete"] == "yes" and "copy bandwidth" in header
    assert {row["provider"] for row in rows} >= {"eager"}
    assert "Measuring layer_norm" in capsys.readouterr().out


def test_run_refuses_what_it_cannot_measure(capsys):
    for arguments, sentence in (
        (["nothing"], "unknown op nothing"),
        ([], "name ops, or give --all"),
    ):
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert sentence in capsys.readouterr().err
