"""The CUDA backend without a GPU: csrc/cuda, compiled by g++, in a child process of its own.

    with Child(build()) as child:
        child.call(test, **kwargs)      runs it where backend="cuda" takes CPU tensors

What runs is all of the backend but the GPU: slimkernels/backends/cuda/*.py, bindings.cpp and the
kernels, every thread a fiber (cuda_on_cpu.h) under AddressSanitizer. It is the twin of Triton's
interpreter. tests/cuda_on_cpu/conftest.py sends every test of this folder through it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from sysconfig import get_paths

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SOURCES = ROOT / "csrc/cuda"
# Questions to the driver, which device.cpp answers instead.
NOT_HERE = ("device.cu",)

FLAGS = ["-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-shared", "-fno-gnu-unique", "-Wl,-Bsymbolic"]
FLAGS += ["-mfma", "-ffp-contract=fast"]  # as nvcc does: a product and a sum are rounded once
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
# One library of attention and one of all other .cu files, which share headers and templates: file
# by file they take twice as long. Attention, unrolled, would take as long again if checked for
# undefined behaviour; its index arithmetic is, by itself, in test_attention_faults.py.
LIBRARIES = {"attention": [SANITIZE[0].replace(",undefined", "")], "rows": SANITIZE}
OPTIONS = "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:handle_abort=1"


class KernelFault(AssertionError):
    """The child died, which AddressSanitizer has told why; or a call in it raised."""


def cuda_include() -> str:
    """Where the toolkit's headers are; nvcc on the PATH may be a script, so it is asked."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if shutil.which("g++") is None or nvcc is None:
        pytest.skip("g++ and the CUDA toolkit's headers are needed")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the fibers of cuda_on_cpu.h are written for x86-64")
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    (top,) = [line[7:] for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    return f"{top}/include"


def build() -> Path:
    """The folder with _cuda.so, made of csrc/cuda as it is now unless an earlier call has."""
    include = cuda_include()
    cache = Path(tempfile.gettempdir()) / f"slimkernels-cuda-on-cpu-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # files of tests run in several processes
        return _build(cache, include)


def _build(cache: Path, include: str) -> Path:
    """A folder a state of the sources."""
    headers = [*sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cuh"))]
    headers += [*sorted(HERE.glob("*.h")), Path(__file__)]
    kernels = [p for p in sorted(SOURCES.glob("*.cu")) if p.name not in NOT_HERE]
    bindings = [SOURCES / "bindings.cpp", HERE / "device.cpp"]
    folder = cache / _digest(*headers, *kernels, *bindings)
    if (folder / "_cuda.so").exists():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        making = Path(scratch) / "made"
        making.mkdir()
        includes = [f"-I{path}" for path in (SOURCES, HERE, include)]
        running: list[subprocess.Popen] = []
        for library, sanitize in LIBRARIES.items():
            unit = making / f"{library}.cpp"
            is_wanted = library == "attention"
            sources = [p for p in kernels if p.stem.startswith("attention") == is_wanted]
            unit.write_text("".join(f'#include "{source}"\n' for source in sources))
            command = ["g++", *FLAGS, *sanitize, *includes, unit, "-o", making / f"lib{library}.so"]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for process in running:
            _finish(process)
        includes += [f"-I{pybind11()}", f"-I{get_paths()['include']}"]
        command = ["g++", *FLAGS, "-O0", *includes]  # no kernel is in it
        command += ['-DSLIM_CUDA_ARCHITECTURES="9.0a"']
        command += [*bindings, "-o", making / "_cuda.so", f"-L{making}", "-Wl,--no-as-needed"]
        command += [*(f"-l{library}" for library in LIBRARIES), "-Wl,-rpath,$ORIGIN"]
        _finish(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        making.rename(folder)
    return folder


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def _finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, f"{process.args}\n{errors[-4000:]}"


def pybind11() -> str:
    return pytest.importorskip("pybind11").get_include()


class Child:
    """A process whose slimkernels has the CUDA backend in `folder`, which takes CPU tensors."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def call(self, function: Callable, **kwargs) -> None:
        """function(**kwargs) there, in both orders of threads, which must give the same bits. It is
        found again by its file and name."""
        request = function.__code__.co_filename, function.__name__, kwargs
        process = self._process or self._start()
        try:
            pickle.dump(request, process.stdin)
            process.stdin.flush()
            kind, result = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError):
            kind, result = "died", f"the process died\n{self._stop()}"
        if kind == "passed":
            return
        if kind == "skipped":
            pytest.skip(result)
        self._stop()  # a kernel that was left half-way is no ground for the next test
        raise KernelFault(result)

    def _start(self) -> subprocess.Popen:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        preload = " ".join(_library(name) for name in ("libasan.so", "libstdc++.so"))
        paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            **{"LD_PRELOAD": preload, "ASAN_OPTIONS": OPTIONS, "PYTHONPATH": ":".join(paths)},
            **{"UBSAN_OPTIONS": "print_stacktrace=1", "TRITON_INTERPRET": "1"},
            "CUDA_VISIBLE_DEVICES": "",  # no driver beside AddressSanitizer
        }
        self._process = subprocess.Popen(
            [sys.executable, HERE / "child.py", self._folder],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        return self._process

    def _stop(self) -> str:
        """Ends the process; what it wrote of errors."""
        if self._process is None:
            return ""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._process = None
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[:8000]


def _library(name: str) -> str:
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True)
    return found.stdout.strip()
