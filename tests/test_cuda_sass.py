"""What nvcc made of the Hopper kernels, read from the built extension without a GPU.

A kernel that spills, whose products the compiler serialised, or whose exponentials it moved out
from under the products is right and slow: no test of its numbers sees it.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(\S.*?) ;")


def cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        path = Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        if path.exists():
            return str(path)
    found = shutil.which("cuobjdump")
    return found or pytest.skip("cuobjdump is in neither Triton nor the PATH")


@pytest.fixture(scope="module")
def kernels():
    """The instructions of each attention kernel, by its mangled name."""
    built = importlib.util.find_spec("slimkernels._cuda")
    if built is None:
        pytest.skip("slimkernels was built without CUDA")
    command = [cuobjdump(), "-sass", "-arch", "sm_90a", built.origin]
    dump = subprocess.run(command, capture_output=True, text=True).stdout
    functions = {}
    for text in dump.split("Function : ")[1:]:
        name, _, body = text.partition("\n")
        if "attention_sm90" in name:
            functions[name.strip()] = INSTRUCTION.findall(body)
    if not functions:
        pytest.skip("the extension was built without code for sm_90a")
    return functions


def test_hopper_instructions_and_no_spills(kernels):
    for name, code in kernels.items():
        found = {instruction.split()[0].split(".")[0] for instruction in code}
        assert {"HGMMA", "UTMALDG", "USETMAXREG", "SYNCS"} <= found, name
        assert not {"LDL", "STL", "HMMA"} & found, name


def test_exponentials_run_under_the_products(kernels):
    """Between the waits for q @ k^T and for p @ v, and none from there to the end of the loop."""
    forward = {name: code for name, code in kernels.items() if "forward" in name}
    assert len(forward) == 6, "two dtypes, three widths"
    for name, code in forward.items():
        waits = [i for i, instruction in enumerate(code) if "DEPBAR.LE gsb0" in instruction]
        (first,) = [i for i in waits if code[i].endswith("0x1")]
        second = min(i for i in waits if i > first)
        end = min(i for i in range(second, len(code)) if code[i].startswith("BRA"))
        scores = 40 if "Li256E" in name else 64  # of a thread
        assert count(code[first:second], "MUFU.EX2") >= scores, name
        assert count(code[second:end], "MUFU") == 0, name
        assert count(code[second:end], "FMUL") >= 32, f"{name}: this is not the end of the loop"
        # Nothing waits between the first product of a step and the last.
        step = max(i for i in range(first) if code[i].startswith("WARPGROUP.ARRIVE"))
        assert count(code[step:first], "HGMMA") in (5, 8), name


def count(code, start):
    return sum(instruction.startswith(start) for instruction in code)
