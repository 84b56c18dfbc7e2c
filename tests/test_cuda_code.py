"""The CUDA extension's machine code: no kernel spills its registers, and wide loads are wide.

Read from slimkernels._cuda as it is built here, by the cuobjdump of the toolkit or of Triton.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# What must be in the code of the kernels whose names match; none of them may use local memory. A
# name has the element type and the elements of a load: Li8 of a 16-bit type are 16 bytes.
ALIGNED = r"({})_kernelI(fLi4|6__halfLi8|13__nv_bfloat16Li8)E"
EXPECTED = {
    ALIGNED.format("norm_forward"): ("LDG.E.128", "STG.E.128", "no LDG.E.U16", "no STG.E.U16"),
    ALIGNED.format("norm_backward"): ("LDG.E.128", "STG.E.128", "no LDG.E.U16", "no STG.E.U16"),
    ALIGNED.format("softmax_forward"): ("LDG.E.128", "STG.E.128", "no STG.E.U16"),
    ALIGNED.format("softmax_backward"): ("LDG.E.128", "STG.E.128", "no LDG.E.U16", "no STG.E.U16"),
    ALIGNED.format("cross_entropy_forward"): ("LDG.E.128",),
    ALIGNED.format("cross_entropy_backward"): ("LDG.E.128", "STG.E.128", "no STG.E.U16"),
    ALIGNED.format("activation_forward"): ("LDG.E.128", "STG.E.128", "no LDG.E.U16"),
    ALIGNED.format("activation_backward"): ("LDG.E.128", "STG.E.128", "no STG.E.U16"),
    r"_(forward|backward)_kernelI\w+Li1E": (),
    r"(column_sums|cross_entropy_total)_kernel": (),
}


def _cuobjdump(*options: str) -> str:
    spec = importlib.util.find_spec("slimkernels._cuda")
    if spec is None:
        pytest.skip("slimkernels was built without CUDA")
    triton = importlib.util.find_spec("triton")
    bundled = triton and Path(triton.origin).parent / "backends/nvidia/bin"
    tool = shutil.which("cuobjdump") or (triton and shutil.which("cuobjdump", path=str(bundled)))
    if tool is None:
        pytest.skip("neither the toolkit nor Triton has brought cuobjdump")
    done = subprocess.run([tool, *options, spec.origin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _resources() -> dict[str, dict[str, str]]:
    """{architecture: {kernel: what ptxas gave it}}"""
    found: dict[str, dict[str, str]] = {}
    architecture = kernel = ""
    for line in _cuobjdump("-res-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found.setdefault(architecture, {})[kernel] = line.strip()
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_no_spills(name):
    for architecture, kernels in _resources().items():
        usage = {kernel: used for kernel, used in kernels.items() if re.search(name, kernel)}
        assert usage, f"{architecture} has no kernel {name}"
        for kernel, used in usage.items():
            assert "STACK:0" in used and "LOCAL:0" in used, (architecture, kernel, used)


@pytest.mark.parametrize("name", [name for name, instructions in EXPECTED.items() if instructions])
def test_instructions(name):
    architecture = next(iter(sorted(_resources(), key=lambda arch: "90" not in arch)))
    kernels = [kernel for kernel in _resources()[architecture] if re.search(name, kernel)]
    code = _cuobjdump("-sass", "-arch", architecture, "-fun", ",".join(kernels))
    bodies = re.split(r"\bFunction : ", code)[1:]
    assert len(bodies) == len(kernels)
    for body in bodies:
        for expected in EXPECTED[name]:
            instruction = re.escape(expected.removeprefix("no "))
            found = re.search(rf"\b{instruction}\b", body) is not None
            assert found != expected.startswith("no "), (body[:80], expected)
