"""The GPU kit: limits, failures and kills lose neither the other stages nor the results."""

import json
import sys
import tarfile

import pytest

from benchmarks import gpu_kit
from benchmarks.gpu_kit import Stage


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", str(tmp_path / "back"))
    (tmp_path / "back").mkdir()
    return gpu_kit.parse(["--device", "cpu", "--quick", "--minutes", "1"])


def stage(name, program, minutes=1.0, **fields):
    return Stage(name, [sys.executable, "-c", program], minutes, **fields)


def run(options, *stages):
    kit = gpu_kit.Kit(options, list(stages))
    kit.run()
    return json.loads((options.out / "summary.json").read_text())["stages"]


def test_a_failing_stage_does_not_stop_the_others(options):
    stages = [
        stage("build", "print('boom'); raise SystemExit(3)"),
        stage("test", "print('2 passed')"),
        stage("sanitize", "", unavailable="there is no checker"),
    ]
    summary = {s["name"]: s for s in run(options, *stages)}
    assert summary["build"]["status"] == "failed with exit code 3"
    assert summary["build"]["last_line"] == "boom"
    assert summary["test"]["status"] == "passed" and summary["test"]["last_line"] == "2 passed"
    assert summary["sanitize"]["status"] == "skipped: there is no checker"
    assert [s.failed for s in stages] == [True, False, False]


def test_a_stage_over_its_limit_is_ended_and_the_rest_runs(options):
    hung = stage("build", "import time; time.sleep(60)", minutes=0.5 / 60)
    summary = run(options, hung, stage("test", "print('ran')"))
    assert summary[0]["status"].startswith("timed out") and summary[0]["seconds"] < 10
    assert hung.failed and summary[1]["status"] == "passed"


def test_a_stage_without_time_is_skipped(options):
    options.minutes = 0.0
    summary = run(options, stage("build", "print('ran')"))
    assert summary[0]["status"] == "skipped: no time is left"


def test_the_archive_holds_results_and_logs_as_they_come(options, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_kit, "_SAVE_EVERY", 0.1)
    archive = tmp_path / "back" / "gpu_kit.tar.gz"
    wait_for_archive = (
        "import pathlib, time\n"
        f"while not pathlib.Path({str(archive)!r}).exists(): time.sleep(0.05)\n"
        "print('saw it')"
    )
    run(options, stage("ops", wait_for_archive, minutes=0.5))
    with tarfile.open(archive) as file:
        names = file.getnames()
    assert "results/summary.json" in names and "logs/ops.txt" in names
    assert (tmp_path / "back" / "summary.txt").exists()


def test_kernels_are_compiled_not_interpreted(options, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    program = "import os, sys; sys.exit('TRITON_INTERPRET' in os.environ)"
    assert run(options, stage("test", program))[0]["status"] == "passed"


@pytest.mark.parametrize("flags", [[], ["--keep-tiles"]])
def test_tuned_tiles_are_copied_beside_the_results_and_if_asked_into_the_package(
    flags, options, tmp_path, monkeypatch
):
    own, package = tmp_path / "home/some-gpu.json", tmp_path / "package"
    own.parent.mkdir(), package.mkdir()
    monkeypatch.setattr(gpu_kit, "TILES", package)
    monkeypatch.setattr(gpu_kit, "tiles_file", lambda device: own)
    options = gpu_kit.parse(["--device", "cpu", "--quick", *flags])
    run(options, stage("tune", "print('no GPU after all')"))
    assert not list(package.iterdir())  # nothing was tuned
    run(options, stage("tune", f"open({str(own)!r}, 'w').write('tiles')"))
    assert (options.out / "attention_tiles.json").read_text() == "tiles"
    assert [p.name for p in package.iterdir()] == (["some-gpu.json"] if flags else [])
    with tarfile.open(tmp_path / "back" / "gpu_kit.tar.gz") as file:
        assert "results/attention_tiles.json" in file.getnames()


def test_tuning_stops_itself_before_the_kit_does_and_comes_between_tests_and_benchmarks():
    stages = gpu_kit.stages_of(gpu_kit.parse(["--dry-run"]))
    assert [stage.name for stage in stages] == gpu_kit.NAMES
    tune = stages[gpu_kit.NAMES.index("tune")]
    assert tune.command[2:] == ["slimkernels.scripts.main", "tune", "attention", "--minutes", "6"]
    assert tune.minutes > 6 and not tune.unavailable
    assert gpu_kit.NAMES.index("test") < stages.index(tune) < gpu_kit.NAMES.index("ops")
    stages = gpu_kit.stages_of(gpu_kit.parse(["--device", "cpu"]))
    (on_cpu,) = [stage for stage in stages if stage.name == "tune"]
    assert on_cpu.unavailable == "tiles are tuned on a GPU"


def test_dry_run_shows_the_commands_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gpu_kit.main(["--dry-run", "--stages", "build,ops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["build", "ops"]
    assert "-m benchmarks.run --all --device cuda" in lines[1]
    assert not list(tmp_path.iterdir())


def test_unknown_stage(capsys):
    with pytest.raises(SystemExit):
        gpu_kit.main(["--stages", "bulid"])
    assert "unknown stage bulid" in capsys.readouterr().err
