"""What hopper_on_cpu.h is for: attention's kernel with a fault is found wrong, or stopped.

And what it is made of by itself: index arithmetic, and the wrappers of Hopper's instructions.
"""

import os
import shutil
import subprocess

import pytest
from cuda_on_cpu.harness import HERE, SANITIZE, SOURCES, cuda_include

pytestmark = pytest.mark.here

CONSUMER, PRODUCER = "attention_sm90_consumer.cuh", "attention_sm90.cuh"
PARTS = "attention_sm90_parts.cuh"
TILES, WGMMA = "attention_tiles.cuh", "wgmma.cuh"
# name: (file, the right text, what stands there instead); IT is the fault's switch.
PLANTED = {
    "mask off by one": (TILES, "+ shape.right + 1)", "+ shape.right + 1 + IT)"),
    "wrong step": (WGMMA, "k % kPanelColumns * 2,", "k % kPanelColumns * (IT ? 4 : 2),"),
    "wrong panel": (WGMMA, "Bytes, panel_bytes(rows),", "Bytes, panel_bytes(rows) * (IT ? 2 : 1),"),
    "one head's rows": (TILES, "packed + row % packed}", "packed + (IT ? 0 : row % packed)}"),
    "a token a row": (TILES, "first + row / packed,", "first + row / (IT ? 1 : packed),"),
    "one head's mask": (CONSUMER, "row(1) / packed}", "row(1) / (IT ? 1 : packed)}"),
    "wrong parity": (CONSUMER, "().q_full, q_parity)", "().q_full, q_parity ^ IT)"),
    "keys freed early": (
        *(CONSUMER, "    wgmma_wait<1>();\n    fence_registers(s);\n"),
        "    if (IT) free_keys(is_last);\n    wgmma_wait<1>();\n    if (!IT)\n",
    ),
    "values freed early": (
        *(CONSUMER, "    wgmma_wait<0>();\n    fence_registers(o);\n    fence_registers(p);\n"),
        '    if (IT) free_values();\n    if (!planted("outputs not waited for")) wgmma_wait<0>();\n'
        "    if (!IT)\n",
    ),
    "outputs not waited for": (CONSUMER, "#pragma once\n", "#pragma once\n"),  # just above
    "keys not waited for": (CONSUMER, "if (!is_last) wait_keys", "if (!is_last && !IT) wait_keys"),
    "values not waited for": (
        *(CONSUMER, "    wait_values();\n    wgmma_fence();\n    issue_outputs(o, p);\n    pass"),
        "    if (!IT) wait_values();\n    wgmma_fence();\n    issue_outputs(o, p);\n    pass",
    ),
    "scores not waited for": (CONSUMER, "    wgmma_wait<1>();", "    if (!IT) wgmma_wait<1>();"),
    "no wgmma fence": (
        *(CONSUMER, "    wait_turn();\n    wgmma_fence();"),
        "    wait_turn();\n    if (!IT) wgmma_fence();",
    ),
    "outputs not rescaled": (
        *(CONSUMER, "o[i] *= shrink[row_of_element(i)]"),
        "o[i] *= IT ? 1.f : shrink[row_of_element(i)]",
    ),
    "turn not waited for": (CONSUMER, "    wait_turn();\n", "    if (!IT) wait_turn();\n"),
    "tail not cleared": (PARTS, "    (clear_rows<", "    if (!IT) (clear_rows<"),
    "no proxy fence": (PARTS, "  fence_proxy_async();", "  if (!IT) fence_proxy_async();"),
    "loaded before freed": (PRODUCER, "barriers.k.wait_empty", "if (!IT) barriers.k.wait_empty"),
    "freed by one warp": (
        *(PARTS, "  if (is_first_lane()) mbarrier_arrive(barrier);"),
        "  for (int i = 0; i < (IT ? 4 : 1); ++i)\n"
        "    if (threadIdx.x % (IT ? 128 : 32) == 0) mbarrier_arrive(barrier);",
    ),
    "no swizzle": (WGMMA, "#pragma once\n", "#pragma once\n"),  # attention_fault.cpp has it
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention_faults")
    headers = shutil.copytree(SOURCES, folder / "cuda")
    for name, (file, right, wrong) in PLANTED.items():
        text = (headers / file).read_text()
        assert text.count(right) == 1, f"{file} has {text.count(right)} times: {right}"
        (headers / file).write_text(text.replace(right, wrong.replace("IT", f'planted("{name}")')))
    return compiled("attention_fault", headers, folder)


def compiled(name, headers, folder, *flags):
    includes = [f"-I{path}" for path in (headers, HERE, cuda_include())]
    command = ["g++", "-std=c++17", "-O1", "-w", *flags, *includes, HERE / f"{name}.cpp"]
    subprocess.run([*command, "-o", folder / name], check=True)
    return folder / name


def run(program, late, *fault):
    """What it says; nothing if all is well."""
    environment = {**os.environ, "HOPPER_ON_CPU": late}
    done = subprocess.run(
        [program, *fault], env=environment, capture_output=True, text=True, timeout=60
    )
    return f"{done.stdout}{done.stderr} {done.returncode}" if done.returncode else ""


@pytest.mark.parametrize("late", ["", "l", "w", "lw"])
def test_sound_without_a_fault(program, late):
    assert run(program, late) == ""


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_is_found(program, fault):
    assert run(program, "w", fault) or run(program, "l", fault)


def test_tiles(tmp_path):
    """The index arithmetic by itself, for every small shape."""
    assert run(compiled("attention_tiles_test", SOURCES, tmp_path, *SANITIZE), "") == ""


def test_wrappers(tmp_path):
    program = compiled("hopper_test", SOURCES, tmp_path)
    for late in ("w", "l"):
        assert run(program, late) == ""
