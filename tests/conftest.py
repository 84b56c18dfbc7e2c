"""What every test runs under: Triton's repaired interpreter without a GPU, and poisoned memory."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

# Last, so that an installed slimkernels is found before the source folder beside benchmarks/.
sys.path.append(str(Path(__file__).parent.parent))

# Triton decides when it is imported, so this must come before the package: without a GPU the
# kernels run in its interpreter, with the repairs in interpreter.py.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter  # noqa: F401


def _words(item) -> set[str]:
    """The parts of a test's identity: its function's name and its parameters."""
    return set(re.split(r"[\[\]-]", item.name))


def pytest_collection_modifyitems(items):
    """Triton's interpreter is slow, and float16's kernels are bfloat16's, those of compiled calls
    the eager ones'. layer_norm stands for all; -m slow runs the others, as a GPU does.
    """
    is_interpreted = not torch.cuda.is_available()
    for item in items:
        is_alike = "torch.float16" in item.name or {"torch.float32", "compiled"} <= _words(item)
        is_alike = is_alike and "triton" in item.name
        if is_interpreted and is_alike and "test_layer_norm" not in item.nodeid:
            item.add_marker(pytest.mark.slow)
    # First what takes minutes, or one process would be left with it at the end.
    items.sort(key=lambda item: "test_drawn_calls" not in item.name)


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty returns NaN, so a kernel that leaves an element unwritten fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def run_kernels_where_eager_is_faster(monkeypatch):
    """The CPU's kernels must be right at the small sizes that they leave to ATen, too."""
    from slimkernels.dispatch import OPS

    for op in OPS.values():
        module = op.modules.get("cpu")
        for name in () if module is None or isinstance(module, str) else vars(module):
            if name.startswith("MIN_"):
                monkeypatch.setattr(module, name, 0)


@pytest.fixture
def each_isa():
    """Runs the CPU kernels of every instruction set of this machine; restores the best one."""
    cpu = pytest.importorskip("slimkernels._cpu")
    active = cpu.isa()

    def each():
        for isa in cpu.isas_available():
            cpu.set_isa(isa)
            yield isa

    yield each
    cpu.set_isa(active)
