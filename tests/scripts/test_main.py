"""The command line without the packages of the extra `train`."""

import os
import subprocess
import sys

import pytest


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
