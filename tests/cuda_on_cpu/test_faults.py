"""The harness sees what it is for: faults planted in a copy of the headers all kernels share."""

import os
import re
import shutil
import subprocess

import pytest
from cuda_on_cpu.harness import HERE, SANITIZE, SOURCES, cuda_include

pytestmark = pytest.mark.here

# (where it is planted, the right text, what stands there instead)
PLANTED = [
    ("reduce.cuh", "word, lane_mask)", 'word, planted("wrong lane") ? 0 : lane_mask)'),
    (
        "rows.cuh",
        "    __syncthreads();",
        '    if (!planted("no barrier") && !(planted("missed barrier") && threadIdx.x == 0))'
        "      __syncthreads();",
    ),
    (
        "rows.cuh",
        "    cluster_barrier();\n    value",
        '    if (!planted("no cluster barrier")) cluster_barrier();\n    value',
    ),
    ("rows.cuh", "&slots[block_]", '&slots[planted("wrong block") ? 0 : block_]'),
    ("rows.cuh", "      if (col < N) visit", '      if (col < N + planted("too long")) visit'),
    ("rows.cuh", "slots[threadIdx.x / 32] =", 'slots[planted("far") * 64 + threadIdx.x / 32] ='),
]
SIZES = {"lanes": (9, 100, 64, 1), "odd": (5, 37, 64, 1), "block": (3, 1000, 64, 1),
         "cluster": (2, 4000, 64, 4)}  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    headers = shutil.copytree(SOURCES, folder / "cuda")
    for file, right, wrong in PLANTED:
        text = (headers / file).read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
        (headers / file).write_text(text.replace(right, wrong))
    includes = [f"-I{path}" for path in (headers, HERE, cuda_include())]
    command = ["g++", "-std=c++17", "-O0", "-g1", "-w", *SANITIZE, *includes]
    subprocess.run([*command, HERE / "row_sum.cpp", "-o", folder / "row_sum"], check=True)
    return folder / "row_sum"


def run(program, size, *fault, order="forward"):
    """What the program and the sanitizer say; nothing if all is well."""
    command = [program, *map(str, SIZES[size]), *fault]
    environment = {**os.environ, "CUDA_ON_CPU_ORDER": order}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("size", SIZES)
def test_sound_without_a_fault(program, size, order):
    assert run(program, size, order=order) == ""


OVERFLOW = r"heap-buffer-overflow(.|\n)*{} of size 4(.|\n)*{}\.cuh:\d+"
FAULTS = {
    "wrong lane": ("lanes", "row 0 is "),
    "no barrier": ("block", "row 0 is "),
    "missed barrier": ("block", "deadlock: some threads never reach the barrier others wait at"),
    "no cluster barrier": ("cluster", "row 0 is "),
    "wrong block": ("cluster", "row 0 is "),
    "too long": ("odd", OVERFLOW.format("READ", "common")),
    "far": ("block", OVERFLOW.format("WRITE", "rows")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported(program, fault):
    size, report = FAULTS[fault]
    reports = [run(program, size, fault, order=order) for order in ("forward", "reverse")]
    assert any(re.search(report, said) for said in reports), reports
