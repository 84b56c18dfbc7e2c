"""The CUDA extension's machine code: no kernel spills its registers, wide loads are wide, and what
should overlap does. No test of a kernel's numbers sees these.

Read from slimkernels._cuda as it is built here, by the cuobjdump of the toolkit or of Triton.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TOOLKIT = "/usr/local/cuda/bin"  # where setup.py looks, too

# What must be in the code of the kernels whose names match; none of them may use local memory. A
# name has the element type and the elements of a load: Li8 of a 16-bit type are 16 bytes.
ALIGNED = r"({})_kernelI(fLi4|6__halfLi8|13__nv_bfloat16Li8)E"
# Loads and counts of a turn in their order: what the CPU's tests cannot see.
TURNS = ("LDG.E.STRONG.GPU", "REDG.E.ADD.S32.STRONG.GPU", "MEMBAR.ALL.GPU", "FENCE.VIEW.ASYNC.G")
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
    # With dq: dS to shared memory by matrices, dq from there by bulk copies, the first of which
    # overwrites, and turns.
    r"attention_sm90_dkdv\w+Lb1E": ("STSM", "UBLKCP", "UBLKRED", "ATOMG", *TURNS),
    r"attention_dq_kernel": ("LDG.E.128", "STG.E.128"),
}


def _find(tool: str, *folders: object) -> str | None:
    found = (shutil.which(tool, path=str(folder)) for folder in folders)
    return shutil.which(tool) or next(filter(None, found), None)


def _cuobjdump(*options: str) -> str:
    triton = importlib.util.find_spec("triton")
    bundled = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    nvcc, tool = _find("nvcc", TOOLKIT), _find("cuobjdump", TOOLKIT, *bundled)
    if nvcc is None or os.environ.get("CUDA_HOME") == "":
        pytest.skip("CUDA is not built here: there is no nvcc, or CUDA_HOME is empty")
    if tool is None:
        pytest.skip("neither the toolkit nor Triton has brought cuobjdump")
    # Where there is nvcc, an extension that is missing is one that did not compile.
    spec = importlib.util.find_spec("slimkernels._cuda")
    assert spec is not None, f"slimkernels was built without CUDA, though {nvcc} is here"
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


def _code_of(part: str, count: int) -> dict[str, str]:
    """{kernel: its code for sm_90a} of attention's kernels of that name, as many as there are."""
    if "sm_90a" not in _resources():
        pytest.skip("the extension was built without sm_90a")
    kernels = [name for name in _resources()["sm_90a"] if f"attention_sm90_{part}" in name]
    assert len(kernels) == count, kernels
    dump = _cuobjdump("-sass", "-arch", "sm_90a", "-fun", ",".join(kernels))
    return {body[: body.index("\n")]: body for body in re.split(r"\bFunction : ", dump)[1:]}


def test_attention_takes_exponentials_under_its_products():
    """In the loop they are between the wait for q @ k^T and that for p @ v; none comes later."""
    for name, body in _code_of("forward", 6).items():  # two dtypes, three widths
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\S.*?) ;", body)
        waits = [i for i, line in enumerate(code) if line.startswith("WARPGROUP.DEPBAR")]
        (scores,) = [i for i in waits if code[i].endswith("0x1")]
        outputs = min(i for i in waits if i > scores)
        loop_end = min(i for i in range(outputs, len(code)) if code[i].startswith("BRA"))
        of_a_thread = 40 if "Li256E" in name else 64
        assert _count(code[scores:outputs], "MUFU.EX2") >= of_a_thread, name
        rest = code[outputs:loop_end]
        assert _count(rest, "MUFU") == 0 and _count(rest, "FMUL") >= 32, name


def _count(code, start):
    return sum(instruction.startswith(start) for instruction in code)


# The walks of each kernel: the products of a step, and how many of them each wait leaves under way.
WALKS = {
    "dkdv": [(4, ["0x1", "0x1", "0x0"])],
    "dkdv with dq": [(5, ["0x1", "0x1", "0x1", "0x0"])],
    "dkdv of 256": [(3, ["0x1", "0x0", "0x0"]), (2, ["0x0", "0x0"])],  # dk, and dv
    "dq": [(3, ["0x1", "0x0", "0x0"])],
}


def _walk(part, name):
    if "Lb1E" in name:
        return WALKS["dkdv with dq"]
    return WALKS.get(f"{part} of 256" if "Li256E" in name else part, WALKS[part])


@pytest.mark.parametrize("part, count", [("dkdv", 10), ("dq", 6)])
def test_attentions_gradients_wait_for_whole_products(part, count):
    """ptxas waits after each step of a product where it runs short of registers. Where it fences
    between steps it counts each (its mark is gsb0): to wait for all but one takes longer then."""
    for name, body in _code_of(part, count).items():
        walks = _walk(part, name)
        pending = [count for _, counts in walks for count in counts]
        assert sorted(re.findall(r"DEPBAR\.LE gsb0, (0x\d)", body)) == sorted(pending), name
        products = sum(count for count, _ in walks)
        assert len(re.findall(r"HGMMA.*gsb0", body)) == products, name


def _declared_registers() -> dict[str, set[tuple[int, int]]]:
    """{kernel: the (producer's, consumers') registers of its tiles}, as csrc/cuda declares them."""
    sources = Path(__file__).parent.parent / "csrc/cuda"
    found = {}
    for part, file in {
        "forward": "attention_sm90.cuh",
        "dkdv": "attention_sm90_backward_keys.cuh",
        "dq": "attention_sm90_backward_queries.cuh",
    }.items():
        text = (sources / file).read_text()
        pairs = [
            re.search(rf"k{role}Registers = ([^;,]*)", text)[1].split(" ? ")[-1].split(" : ")
            for role in ("Producer", "Consumer")
        ]
        found[part] = set(zip(*([int(number) for number in pair] for pair in pairs), strict=True))
    return found


@pytest.mark.parametrize("part, count", [("forward", 6), ("dkdv", 10), ("dq", 6)])
def test_setmaxnreg_asks_for_what_is_declared(part, count):
    """One group gives registers away and the others take them, in machine code as in the source."""
    seen = set()
    for name, body in _code_of(part, count).items():
        given = re.findall(r"USETMAXREG\.DEALLOC\S* (0x[0-9a-f]+)", body)
        taken = re.findall(r"USETMAXREG\.TRY_ALLOC\S* \S+ (0x[0-9a-f]+)", body)
        assert len(given) == len(taken) == 1, name
        seen.add((int(given[0], 16), int(taken[0], 16)))
    assert seen == _declared_registers()[part]
