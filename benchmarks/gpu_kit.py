"""One command for a GPU machine: build, test, check memory, tune, benchmark, write results.

    python -m benchmarks.gpu_kit --minutes 25
    python -m benchmarks.gpu_kit --minutes 60 --stages build,tune --keep-tiles

Each stage is a process with a limit of its own; one that fails or runs over does not stop the
others, and one for which no time is left is skipped with a line that says so. Results go to
benchmarks/results/<device>/ as they come, logs beside them in runs/gpu_kit/; where $OUT is set, an
archive of both is kept up to date there, so that a kill loses at most seconds. No network is used.

What is benchmarked runs in the tiles that the stage before found: the user's own table, which stays
for all later runs and of which attention_tiles.json beside the results is a copy. Six minutes are
for the entries that most models need. To benchmark the tiles that come with the package, leave the
stage out and move that table away. --keep-tiles has time for every entry, and copies the table into
the package, too: commit it, and nobody with this GPU need tune.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import provenance, results

ROOT = provenance.ROOT
TILES = ROOT / "slimkernels/backends/triton/configs"
_SAVE_EVERY = 15.0  # seconds between two archives while a stage runs


@dataclass
class Stage:
    """One process: what it runs, and for how long at most."""

    name: str
    command: list[str]
    minutes: float
    unavailable: str = ""  # why it cannot run here, in a sentence
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not reached"
    seconds: float = 0.0
    last_line: str = ""

    @property
    def failed(self) -> bool:
        return self.status.startswith(("failed", "timed out", "interrupted"))


def main(argv: list[str] | None = None) -> int:
    """0 if no stage failed, 1 if one did, 2 on bad arguments, 130 when interrupted."""
    options = parse(argv)
    stages = [stage for stage in stages_of(options) if stage.name in options.stages]
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name:<9} at most {stage.minutes:g} min: {_shown(stage.command)}")
            if stage.unavailable:
                print(f"{'':<9} would be skipped: {stage.unavailable}")
        return 0
    kit = Kit(options, stages)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{len(stages)} stages in at most {options.minutes:g} min; results in {options.out}/")
    try:
        kit.run()
    except KeyboardInterrupt:
        print("interrupted")
        return 130
    finally:
        kit.save()
        print((options.out / "summary.txt").read_text(), end="")
    return 1 if any(stage.failed for stage in stages) else 0


NAMES = ["build", "test", "sanitize", "tune", "ops", "models", "pretrain"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_kit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together")
    parser.add_argument("--stages", default=",".join(NAMES), help="comma-separated")
    parser.add_argument("--quick", action="store_true", help="the least of each stage")
    parser.add_argument(
        "--keep-tiles", action="store_true", help="put the tuned tiles into the package"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    parser.add_argument("--commit", help="to record where there is no git checkout")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>")
    options = parser.parse_args(argv)
    options.stages = options.stages.split(",")
    unknown = [name for name in options.stages if name not in NAMES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]}; the stages are {', '.join(NAMES)}")
    if options.device == "cuda" and not torch.cuda.is_available() and not options.dry_run:
        parser.error("torch sees no GPU here; --device cpu tries the kit out")
    if options.commit:
        os.environ["SLIMKERNELS_COMMIT"] = options.commit
    shown = torch.device("cpu" if not torch.cuda.is_available() else options.device)
    options.slug = provenance.device_slug(shown)
    base = Path(
        "runs/gpu_kit" if options.quick or options.device == "cpu" else "benchmarks/results"
    )
    options.out = options.out or base / options.slug
    return options


def stages_of(options: argparse.Namespace) -> list[Stage]:
    """Every stage in order, each a command that also works alone."""
    python, device, out = [sys.executable, "-m"], ["--device", options.device], str(options.out)
    quick = ["--quick"] if options.quick else []
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    checked = [sanitizer or "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    no_sanitizer = "" if sanitizer else "compute-sanitizer is not on the PATH"
    if options.device == "cpu":
        no_sanitizer = "compute-sanitizer checks GPU kernels only"
    # The least: the exemplar op, in every backend of this machine.
    tests = ["tests/ops/test_layer_norm.py" if options.quick else "tests"]
    size = ["--size", "quick"] if options.quick else []
    tuning, tuned = 45 if options.keep_tiles else 6, ["tune", "attention"]
    tuned += ["--kernel", "forward", "--width", "64", "--quick"] if options.quick else []
    result = ["--out", out]
    return [
        Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 5),
        Stage("test", [*python, "pytest", "-q", "-rfE", *tests], 10),
        Stage(
            "sanitize",
            [*checked, *python, "benchmarks.smoke", *device],
            4,
            no_sanitizer,
            # Each tensor in a block of its own, so that the checker sees where it ends.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Stage(
            "tune",
            # The limit it sets itself is no failure; an entry takes under a minute.
            [*python, "slimkernels.scripts.main", *tuned, "--minutes", str(tuning)],
            tuning + 1,
            "" if options.device == "cuda" else "tiles are tuned on a GPU",
        ),
        Stage("ops", [*python, "benchmarks.run", "--all", *device, *quick, *result], 10),
        Stage("models", [*python, "benchmarks.models.bert_training", *device, *quick, *result], 6),
        Stage("pretrain", [*python, "benchmarks.models.pretraining", *device, *size, *result], 4),
    ]


def tiles_file(device: str) -> Path | None:
    """The user's own table of attention's tiles for this GPU."""
    if device != "cuda":
        return None
    from slimkernels.backends.triton import _attention_tiles

    return _attention_tiles.user_table(torch.cuda.get_device_name())


class Kit:
    """Runs the stages against the clock and keeps the summary and the archive up to date."""

    def __init__(self, options: argparse.Namespace, stages: list[Stage]) -> None:
        self.stages, self.out = stages, options.out
        self.logs = Path("runs/gpu_kit") / options.slug / "logs"
        self.deadline = time.monotonic() + 60 * options.minutes
        self.facts = provenance.provenance(torch.device(options.device))
        self.tiles, self.into_package = tiles_file(options.device), options.keep_tiles
        for folder in (self.out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        for stage in self.stages:
            left = self.deadline - time.monotonic()
            if stage.unavailable:
                stage.status = f"skipped: {stage.unavailable}"
            elif left < 10:
                stage.status = "skipped: no time is left"
            else:
                print(f"{stage.name}: {_shown(stage.command)}", flush=True)
                self.run_stage(stage, min(60 * stage.minutes, left))
            print(f"{stage.name}: {stage.status} ({stage.seconds:.0f} s)", flush=True)
            if stage.name == "tune":
                self.keep_tiles()
            self.save()

    def run_stage(self, stage: Stage, limit: float) -> None:
        """Run one stage for `limit` seconds at most; its output goes to its log."""
        log, start = self.logs / f"{stage.name}.txt", time.monotonic()
        stage.status = "interrupted"
        with log.open("w") as output:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=self.environment() | stage.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # so that a limit ends its children too
            )
            try:
                code = self.wait(process, start + limit)
            finally:
                _end(process)
        stage.seconds = time.monotonic() - start
        stage.status = f"timed out after {limit:.0f} s" if code is None else "passed"
        if code:
            stage.status = f"failed with exit code {code}"
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        stage.last_line = lines[-1].replace(str(ROOT), ".")[:200] if lines else ""
        if stage.failed:
            print("\n".join(lines[-25:]), flush=True)

    def wait(self, process: subprocess.Popen, deadline: float) -> int | None:
        """The exit code, or None at the deadline; the archive is renewed meanwhile."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                return process.wait(min(left, _SAVE_EVERY))
            except subprocess.TimeoutExpired:
                self.archive()
        return None

    def environment(self) -> dict[str, str]:
        """What the stages run under: kernels compiled, not interpreted, for this GPU alone."""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONUNBUFFERED"] = "1"
        if torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in environment:
            major, minor = torch.cuda.get_device_capability()
            suffix = "a" if major >= 9 else ""
            environment["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}{suffix}"
        return environment

    def save(self) -> None:
        """summary.json and summary.txt, then the archive."""
        stages = [asdict(stage) for stage in self.stages]
        for stage in stages:
            stage["command"] = _shown(stage["command"])
        summary = {"provenance": self.facts, "stages": stages}
        results.write_text(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        table = results.text_table(stages, ["name", "status", "seconds", "last_line"])
        header = "".join(f"# {name}: {value}\n" for name, value in self.facts.items())
        results.write_text(self.out / "summary.txt", f"{header}{table}\n")
        self.archive()

    def keep_tiles(self) -> None:
        """Copy the table that the kernels use beside the results, and into the package if asked."""
        if self.tiles is None or not self.tiles.exists():
            return
        shutil.copy(self.tiles, self.out / "attention_tiles.json")
        if self.into_package:
            shutil.copy(self.tiles, TILES / self.tiles.name)

    def archive(self) -> None:
        """Everything so far, in one file: $OUT takes few."""
        if not os.environ.get("OUT"):
            return
        target = Path(os.environ["OUT"])
        if target.resolve() == self.out.resolve():
            return
        partial = target / "gpu_kit.tar.gz.partial"
        with tarfile.open(partial, "w:gz") as file:
            file.add(self.out, "results")
            file.add(self.logs, "logs")
        os.replace(partial, target / "gpu_kit.tar.gz")
        for name in ("summary.json", "summary.txt"):
            if (self.out / name).exists():
                shutil.copy(self.out / name, target / name)


def _end(process: subprocess.Popen) -> None:
    """Kill what is left of a stage's process group: it was started for this stage alone."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _shown(command: list[str]) -> str:
    return " ".join(Path(word).name if word.startswith("/") else word for word in command)


if __name__ == "__main__":
    sys.exit(main())
