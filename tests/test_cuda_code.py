"""The CUDA extension's machine code: no kernel spills its registers, wide loads are wide, and what
should overlap does. No test of a kernel's numbers sees these.

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
    r"attention_sm90": ("HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"),
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


def test_attention_takes_exponentials_under_its_products():
    """In the loop they are between the wait for q @ k^T and that for p @ v; none comes later."""
    if "sm_90a" not in _resources():
        pytest.skip("the extension was built without sm_90a")
    kernels = [name for name in _resources()["sm_90a"] if "attention_sm90_forward" in name]
    assert len(kernels) == 6, "two dtypes, three widths"
    dump = _cuobjdump("-sass", "-arch", "sm_90a", "-fun", ",".join(kernels))
    for body in re.split(r"\bFunction : ", dump)[1:]:
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\S.*?) ;", body)
        waits = [i for i, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR")]
        (scores,) = [i for i in waits if code[i].endswith("0x1")]
        outputs = min(i for i in waits if i > scores)
        loop_end = min(i for i in range(outputs, len(code)) if code[i].startswith("BRA"))
        of_a_thread = 40 if "Li256E" in body[:200] else 64
        assert _count(code[scores:outputs], "MUFU.EX2") >= of_a_thread, body[:80]
        rest = code[outputs:loop_end]
        assert _count(rest, "MUFU") == 0 and _count(rest, "FMUL") >= 32, body[:80]


def _count(code, start):
    return sum(instruction.startswith(start) for instruction in code)


def test_attentions_gradients_wait_for_whole_products():
    """ptxas waits after each step of a product where it runs short of registers. Where it fences
    between steps it counts each (its mark is gsb0): to wait for all but one takes longer then."""
    if "sm_90a" not in _resources():
        pytest.skip("the extension was built without sm_90a")
    code = {"dkdv": (4, ["0x1", "0x1", "0x0"]), "dq": (3, ["0x1", "0x0", "0x0"])}
    for name, (products, pending) in code.items():
        kernels = [
            kernel for kernel in _resources()["sm_90a"] if f"attention_sm90_{name}" in kernel
        ]
        assert len(kernels) == 4, "two dtypes, two widths"
        dump = _cuobjdump("-sass", "-arch", "sm_90a", "-fun", ",".join(kernels))
        for body in re.split(r"\bFunction : ", dump)[1:]:
            assert re.findall(r"DEPBAR\.LE gsb0, (0x\d)", body) == pending, body[:80]
            assert len(re.findall(r"HGMMA.*gsb0", body)) == products, body[:80]
