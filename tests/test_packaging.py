"""What setup.py does where a compiler, nvcc, pybind11 or the right Python is missing.

Each test runs setup.py on a copy of the sources: no build leaves a trace in the checkout. Builds
that take long are marked slow and run with `pytest -m slow`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytest.importorskip("setuptools", reason="setup.py needs setuptools")


@pytest.fixture
def copy(tmp_path):
    """The sources alone, with one small C++ file a folder in the place of the kernels'."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc"):
        source = ROOT / name
        copier = shutil.copytree if source.is_dir() else shutil.copy
        copier(source, tmp_path / name)
    (tmp_path / "slimkernels").mkdir()
    (tmp_path / "slimkernels/__init__.py").touch()
    return tmp_path


def shorten(copy: Path) -> None:
    """One trivial source an extension, so that a build takes a second."""
    for module in ("cpu", "cuda"):
        for path in (copy / "csrc" / module).glob("*.c*"):
            path.unlink()
    module = 'PYBIND11_MODULE(_cpu, m) { m.attr("answer") = 42; }'
    (copy / "csrc/cpu/bindings.cpp").write_text(f"#include <pybind11/pybind11.h>\n{module}")


def build(copy: Path, *, code: str = "", **environment: str) -> subprocess.CompletedProcess:
    """`python setup.py build_ext --inplace`, after `code`, which may take modules away."""
    code += "\nimport sys; sys.argv = ['setup.py', 'build_ext', '--inplace']"
    code += "\nexec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    code = "__file__ = 'setup.py'\n" + code
    environment = {**os.environ, "CUDA_HOME": "", **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def toolkit(folder: Path, nvcc: str, runtime: bool = True) -> Path:
    """A CUDA toolkit whose nvcc is this script."""
    (folder / "lib64").mkdir(parents=True)
    (folder / "bin").mkdir()
    if runtime:
        (folder / "lib64/libcudart_static.a").touch()
    compiler = folder / "bin/nvcc"
    compiler.write_text(nvcc)
    compiler.chmod(0o755)
    return compiler


def built(copy: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in copy.glob("slimkernels/*.so"))


def test_without_a_compiler_the_install_succeeds_and_says_what_is_missing(copy):
    done = build(copy, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    assert "slimkernels: slimkernels._cpu was not built" in done.stderr
    assert "slimkernels: nvcc was not found, so CUDA is not built" in done.stderr
    assert built(copy) == []


def test_a_compile_error_is_not_fatal_either(copy):
    shorten(copy)
    (copy / "csrc/cpu/bindings.cpp").write_text("#error planted")
    done = build(copy)
    assert done.returncode == 0, done.stderr
    assert "slimkernels: slimkernels._cpu was not built" in done.stderr
    assert built(copy) == []


@pytest.mark.parametrize("runtime", [True, False], ids=["nvcc fails", "no libcudart"])
def test_a_broken_toolkit_leaves_the_cpu_extension(copy, tmp_path, runtime):
    shorten(copy)
    toolkit(tmp_path / "toolkit", "#!/bin/sh\nexit 1\n", runtime)
    (copy / "csrc/cuda/planted.cu").write_text("#error planted")
    done = build(copy, CUDA_HOME=str(tmp_path / "toolkit"))
    assert done.returncode == 0, done.stderr
    assert "slimkernels: slimkernels._cuda was not built" in done.stderr
    assert ("has no libcudart_static.a" in done.stderr) != runtime
    assert built(copy) == ["_cpu"]


def test_a_path_with_a_space_a_colon_and_a_dollar(copy):
    shorten(copy)
    odd = copy / "my $HOME: code"
    odd.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "slimkernels"):
        (copy / name).rename(odd / name)
    done = build(odd)
    assert built(odd) == ["_cpu"], done.stderr


NVCC = """#!/bin/sh
case "$1" in
--list-gpu-arch) printf 'compute_%s\\n' 80 86 90 ;;
-std=*) echo "$@" >> "$0.log"; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (None, ["90a,sm_90a", "80,sm_80", "80,compute_80"]),
        ("", ["90a,sm_90a", "80,sm_80", "80,compute_80"]),
        ("8.0;9.0a+PTX;", ["80,sm_80", "90a,sm_90a", "90a,compute_90a"]),
        ("12.0 8.6", ["120,sm_120", "86,sm_86"]),
        ("8.0;Ampere", "TORCH_CUDA_ARCH_LIST has 'Ampere'; only numbers such as 8.0"),
        ("native", "TORCH_CUDA_ARCH_LIST has 'native'; only numbers such as 8.0"),
    ],
)
def test_architectures(copy, monkeypatch, wanted, expected):
    """The default is what nvcc knows of the list, and PTX of the newest for what comes later."""
    shorten(copy)
    (copy / "csrc/cuda/planted.cu").touch()
    compiler = toolkit(copy / "tool kit", NVCC)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    environment = {} if wanted is None else {"TORCH_CUDA_ARCH_LIST": wanted}
    done = build(copy, CUDA_HOME=str(copy / "tool kit"), **environment)
    assert done.returncode == 0, done.stderr
    assert built(copy) == ["_cpu"]
    if isinstance(expected, str):
        assert f"slimkernels._cuda was not built: {expected}" in done.stderr
        return
    command = Path(f"{compiler}.log").read_text()
    flags = re.findall(r"-gencode=arch=compute_(\w+),code=(\w+)", command)
    assert [",".join(pair) for pair in flags] == expected


def test_torchs_own_pybind11_headers_do(copy):
    """Without network: torch brings pybind11's headers, and no other header of torch is seen."""
    shorten(copy)
    hide = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "pybind11" else find_spec(name, *a)
"""
    done = build(copy, code=hide)
    assert built(copy) == ["_cpu"], done.stderr
    (link,) = (copy / "build").rglob("include/pybind11")
    assert link.is_symlink() and "torch" in str(link.resolve())
    assert os.listdir(link.parent) == ["pybind11"]
    load = "import sys; sys.path.insert(0, 'slimkernels'); import _cpu; print(_cpu.answer)"
    done = subprocess.run([sys.executable, "-c", load], cwd=copy, capture_output=True, text=True)
    assert done.stdout == "42\n", done.stderr


def test_no_torch_header_is_included():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            included = re.findall(r'#include\s*[<"]([^>"]*)', path.read_text())
            assert not [name for name in included if name.split("/")[0] in ("torch", "ATen", "c10")]


@pytest.mark.slow
def test_wheel_in_isolation(tmp_path):
    """`pip wheel .` in pip's own build environment, which has no torch."""
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", "build", "*.so", "runs", "shared", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(copy)]
    subprocess.run(command, check=True, env={**os.environ, "CUDA_HOME": ""})
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True
    ).stdout
    for wanted in ("slimkernels/_cpu.", "slimkernels/data/sample/", "slimkernels/scripts/main.py"):
        assert wanted in names
