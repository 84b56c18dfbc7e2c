"""What every source file must hold to: imports that point one way, the environment, ASCII."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slimkernels"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ENVIRONMENT = {"SLIMKERNELS_BACKEND", "TRITON_INTERPRET"}  # all in dispatch.py

# What each part of the package may import, besides itself; nothing may import testing.
LAYERS = {
    "dispatch": set(),
    "backends": {"_cpu", "_cuda"},
    "ops": {"dispatch"},
    "nn": {"dispatch", "ops"},
    "optim": {"dispatch", "ops"},
    "models": {"dispatch", "ops", "nn"},
    "integrations": {"dispatch", "ops", "nn"},
    "data": set(),
    "training": {"dispatch", "ops", "nn", "optim", "models", "data"},
    "scripts": {
        *("__version__", "dispatch", "info", "ops", "nn", "models", "integrations", "data"),
        "training",
    },
    "__main__": {"scripts"},
    "testing": {"dispatch", "ops"},
    "info": {"__version__", "dispatch"},
    "__init__": {"dispatch", "info", "ops", "nn", "optim", "integrations", "models"},
}
# dispatch.INTERPRETED is a constant, read once from the environment, which only dispatch reads.
# backends/_dropout.py is one number, of which definition and kernels must not have two, and
# backends/_embedding.py one dtype.
# backends/_tensor_lists.py is what updates are given, by the optimizers and in the backends alike,
# and backends/_muon.py has one number that is Muon's definition, too.
# What `slimkernels tune` measures is one backend's, and has no meaning above it.
IMPORT_EXCEPTIONS = {
    ("backends/triton/_common.py", "dispatch"),
    ("ops/_dropout.py", "backends"),
    ("ops/_update.py", "backends"),
    ("ops/embedding.py", "backends"),
    ("ops/muon.py", "backends"),
    ("scripts/tune_attention.py", "backends"),
    ("ops/_call_memory.py", "_cpu"),  # a dict in C++, which is no kernel
}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_parts(path: Path) -> set[str]:
    """The parts of the package that a file imports, lazily or not: {"dispatch", "ops", ...}."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative import"
            if node.module == "slimkernels":
                parts |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("slimkernels."):
                parts.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [a.name.split(".") for a in node.names]
            parts |= {n[1] if len(n) > 1 else "__version__" for n in names if n[0] == "slimkernels"}
    return parts


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert part in LAYERS, f"{part} has no place in the import law"
    for wanted in imported_parts(path) - {part}:
        allowed = wanted in LAYERS[part] or (relative(path), wanted) in IMPORT_EXCEPTIONS
        assert allowed, f"{relative(path)} may not import slimkernels.{wanted}"


def test_the_environment_is_read_in_one_place():
    readers, names = set(), set()
    for path in SOURCES:
        text = path.read_text()
        if re.search(r"\benviron\b|\bgetenv\b", text):
            readers.add(relative(path))
            names |= set(re.findall(r"environ(?:\.get\(|\[)\s*[\"'](\w+)", text))
    assert readers == {"dispatch.py"}, readers
    assert names == ENVIRONMENT, names


TEXTS = sorted(
    path
    for pattern in (
        "slimkernels/**/*.py",
        "csrc/**/*",
        "tests/**/*",
        "benchmarks/**/*",
        "*",
        "docs/*",
    )
    for path in ROOT.glob(pattern)
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".yaml", ".in"}
)


def test_sources_are_ascii():
    assert len(TEXTS) > 50
    bad = [str(path.relative_to(ROOT)) for path in TEXTS if not path.read_bytes().isascii()]
    assert not bad, bad
