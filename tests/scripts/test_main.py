"""The command line, also without the packages of the extra `train`."""

import os
import runpy
import subprocess
import sys

import pytest

from slimkernels.scripts.main import COMMANDS


@pytest.mark.parametrize("argv, status", [([], 0), (["--help"], 0), (["nothing"], 2)])
def test_the_package_runs_as_the_command(argv, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slimkernels", *argv])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("slimkernels", run_name="__main__", alter_sys=True)
    assert end.value.code == status
    shown = capsys.readouterr()
    told = shown.err if status else shown.out
    assert told.startswith("slimkernels: unknown" if status else "usage: slimkernels <command>")
    assert all(name in told for name in COMMANDS)


@pytest.mark.parametrize("package", ["tyro", "tokenizers", "tqdm", "safetensors"])
def test_a_missing_package_is_one_sentence(package, tmp_path):
    script = (
        f"import sys; sys.modules[{package!r}] = None; "
        "from slimkernels.scripts.main import main; sys.exit(main(sys.argv[1:]))"
    )
    # The interpreter's repairs are for pytest's own process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script, "pretrain", "--out", str(tmp_path / "runs")],
        env=environment,
        capture_output=True,
        text=True,
    )
    sentence = f'slimkernels pretrain needs {package}: pip install "slimkernels[train]"\n'
    assert (done.returncode, done.stderr) == (1, sentence)
    assert not (tmp_path / "runs").exists()
