"""Where a number comes from: the header of every result file."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Variables that change a CPU or GPU time; recorded when set.
_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_", "LD_PRELOAD", "SLIMKERNELS_", "CUDA_VIS")


def provenance(device: torch.device, command: str | None = None) -> dict[str, str]:
    """What a reader needs to judge or repeat a run, as ordered lines of a file's header."""
    import slimkernels

    facts = {
        "device": device_name(device),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores, {instruction_set()}",
        "threads": str(torch.get_num_threads()),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "slimkernels": slimkernels.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command or command_line(sys.argv),
        "environment": environment() or "nothing that matters is set",
    }
    if device.type == "cuda":
        facts["driver"] = nvidia_smi("driver_version")
        facts["cuda"] = str(torch.version.cuda)
        facts["attention tiles"] = attention_tiles(device_name(device))
        facts["clocks"] = nvidia_smi("clocks.max.sm,clocks.max.mem") + " MHz at most"
    return facts


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model()} {torch.get_num_threads()} threads"


def attention_tiles(gpu: str) -> str:
    """Which table attention's kernels have their tiles from: a tuned one makes other numbers."""
    if importlib.util.find_spec("triton") is None:
        return "none: Triton is not installed"
    from slimkernels.backends.triton import _attention_tiles as tiles

    for what, path in (
        ("the user's own", tiles.user_table(gpu)),
        ("the package's for this GPU", tiles.SHIPPED / f"{tiles.slug(gpu)}.json"),
    ):
        if path.exists():
            table = tiles.read_table(path)
            date = table.get("made", {}).get("date", "an unknown day")
            return f"{what}: {len(tiles.entries_of(table))} entries of {date}"
    return "the package's for every GPU"


def device_slug(device: torch.device) -> str:
    """The name of the device's folder under benchmarks/results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def cpu_model() -> str:
    """The processor's name; virtual machines shorten it, so the family and model go with it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    numbers = [fields[key] for key in ("cpu family", "model") if key in fields]
    return f"{name} (family {numbers[0]} model {numbers[1]})" if len(numbers) == 2 else name


def instruction_set() -> str:
    """The one the C++ kernels run with here."""
    try:
        from slimkernels import _cpu
    except ImportError:
        return "C++ extension not built"
    return f"C++ kernels on {_cpu.isa() or 'no instruction set of this machine'}"


def version_of(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return "not installed"
    from importlib.metadata import version

    return version(package)


def commit() -> str:
    """The commit, and how many files differ from it; results do not count as a change."""
    try:
        head = _output("git", "rev-parse", "--short=12", "HEAD")
        status = _output("git", "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SLIMKERNELS_COMMIT", "unknown (no git checkout)")
    changed = [line for line in status.splitlines() if "benchmarks/results/" not in line]
    return f"{head} with {len(changed)} changed files" if changed else head


def command_line(argv: list[str]) -> str:
    """The command to repeat; absolute paths, which mean nothing elsewhere, keep their last part."""
    module = Path(argv[0])
    if module.resolve().is_relative_to(ROOT):
        relative = module.resolve().relative_to(ROOT).with_suffix("")
        argv = ["python -m " + ".".join(relative.parts), *argv[1:]]
    return " ".join([argv[0], *(Path(a).name if a.startswith("/") else a for a in argv[1:])])


def environment() -> str:
    chosen = {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)}
    return " ".join(f"{name}={value}" for name, value in chosen.items())


def nvidia_smi(query: str) -> str:
    try:
        line = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (nvidia-smi did not answer)"
    return line.splitlines()[0] if line else "unknown"


def _output(*command: str) -> str:
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    return run.stdout.strip()
