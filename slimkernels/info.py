"""The whole installation in one text: what a bug report needs, and what to install next."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from slimkernels import dispatch

# What each extra of pyproject.toml brings, by import name.
EXTRAS = {
    "train": ("tokenizers", "safetensors", "tqdm", "tyro"),
    "hf": ("tqdm", "transformers", "tyro"),
    "bench": ("matplotlib", "transformers"),
}
_REBUILD = "pip install --force-reinstall --no-deps . , or python setup.py build_ext --inplace"


def info() -> str:
    """Versions, devices, instruction sets, backends, extras, and which op runs where.

    Returns  a text of about 40 lines; of a backend that cannot run here, the reason and the remedy
    """
    states = {backend: _state(backend) for backend in dispatch.BACKENDS}
    sections = {
        "Versions": _versions(),
        "Devices": _devices(),
        "Backends": [
            *(f"{name:<8}{sentence}" for name, (_, sentence) in states.items()),
            *([f"forced  {dispatch._forced}"] if dispatch._forced else []),
        ],
        "Extras": _extras(),
        "Ops (yes: runs here; no: see its backend above; -: no such kernel)": _ops(states),
    }
    lines = []
    for title, body in sections.items():
        lines += [title, *(f"  {line}".rstrip() for line in body)]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if argv:
        print(f"slimkernels info takes no options; got {' '.join(argv)}", file=sys.stderr)
        return 2
    print(info())
    return 0


def _versions() -> list[str]:
    from slimkernels import __version__

    rows = {
        "slimkernels": f"{__version__} in {Path(__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "triton": _version("triton") or "not installed",
        "CUDA": f"{torch.version.cuda or 'none'} (torch's runtime)",
        "nvcc": _nvcc(),
    }
    return [f"{name:<13}{value}" for name, value in rows.items()]


def _version(package: str) -> str | None:
    """The version of an importable package; "" if it does not say."""
    try:
        if sys.modules.get(package, package) is None or not importlib.util.find_spec(package):
            return None
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _nvcc() -> str:
    path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        return "not found (needed only to build the CUDA backend)"
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    return f"{release.group(1) if release else 'unknown version'} at {path}"


def _devices() -> list[str]:
    lines = []
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i}  {device.name}, capability {device.major}.{device.minor}, "
            f"{device.total_memory / 2**30:.1f} GiB, {device.multi_processor_count} multiprocessors"
        )
    lines = lines or ["cuda    none"]
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return [*lines, f"cpu     {_cpu_model()}, {threads}"]


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _state(backend: str) -> tuple[bool, str]:
    """Whether a backend can run anything here, and a sentence about it."""
    if backend == "torch":
        return True, "always: each op's reference, under autograd"
    try:
        common = importlib.import_module(f"slimkernels.backends.{backend}._common")
    except ImportError as error:
        if backend == "triton":
            return False, f"Triton is not usable ({error}): pip install 'triton>=3.6,<3.10' (Linux)"
        return False, _other_python(f"_{backend}") or str(error)
    if backend == "cpu":
        built, here = common._cpu.isas_built(), common._cpu.isas_available()
        used = f"uses {common._cpu.isa()}" if here else "this machine has none of them"
        listed = f"built for {', '.join(built)}; available {', '.join(here) or 'none'}; {used}"
        return bool(here), listed
    if backend == "cuda" and (reason := common._cuda.no_device()):
        return False, f"built, but {reason}"
    if backend == "triton" and dispatch.INTERPRETED:
        return True, "interpreted (TRITON_INTERPRET=1): for tests, only when asked for by name"
    if not torch.cuda.is_available():
        return False, "installed, but torch sees no CUDA device: its kernels need a GPU"
    return True, "runs on the CUDA devices above"


def _other_python(extension: str) -> str | None:
    """A sentence if the extension lies there, built for a Python that is not this one."""
    loadable = {extension + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    found = sorted(path.name for path in Path(__file__).parent.glob(f"{extension}.*"))
    if not found or loadable & set(found):
        return None
    return (
        f"{', '.join(found)} was built for another Python (this one is "
        f"{platform.python_version()}): {_REBUILD}"
    )


def _extras() -> list[str]:
    lines = []
    for extra, packages in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        present = ", ".join(f"{p} {v}".strip() for p, v in versions.items() if v is not None)
        remedy = f'missing {", ".join(missing)}: pip install "slimkernels[{extra}]"'
        lines.append(f"{extra:<8}{remedy if missing else present}")
    return lines


def _ops(states: dict[str, tuple[bool, str]]) -> list[str]:
    width = max(map(len, dispatch.OPS))
    lines = [" " * width + "".join(f"  {backend:<6}" for backend in states)]
    for name, op in sorted(dispatch.OPS.items()):
        cells = [f"  {_cell(op, backend, usable):<6}" for backend, (usable, _) in states.items()]
        lines.append(f"{name:<{width}}{''.join(cells)}")
    return lines


def _cell(op: dispatch.Op, backend: str, usable: bool) -> str:
    spec = f"slimkernels.backends.{backend}.{op.name}"
    if backend != "torch" and importlib.util.find_spec(spec) is None:
        return "-"
    return "yes" if usable else "no"
