"""The CUDA kernels compute what they should, compiled by g++ and run thread by thread on the CPU.

AddressSanitizer watches every access, and the threads of a block run in both orders, which a
missing barrier would tell apart. What only a GPU has (races, launch limits, speed) is not seen.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from slimkernels.ops.softmax import softmax_reference
from slimkernels.testing import assert_no_worse

ROOT = Path(__file__).parent.parent
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# One warp a row (8 and 32 values a lane) and one block a row, aligned and not.
SHAPES = [(1, 1), (5, 37), (9, 64), (6, 256), (3, 515), (5, 1024), (2, 1500), (2, 4104)]


def cuda_include() -> str:
    """Where the toolkit's headers are; nvcc on the PATH may be a script, so it is asked."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if shutil.which("g++") is None or nvcc is None:
        pytest.skip("g++ and the CUDA toolkit's headers are needed")
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    (top,) = [line[7:] for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    return f"{top}/include"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "softmax"
    includes = [f"-I{folder}" for folder in (ROOT / "csrc/cuda", ROOT / "tests", cuda_include())]
    command = ["g++", "-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-w", *includes]
    command += [str(ROOT / "tests/cuda_on_cpu_softmax.cpp"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def run(program, direction, numbers, *arrays, order="forward", offset=False):
    """The last array that the program writes, from the arrays that it reads."""
    folder = program.parent
    names = [str(folder / f"array{i}") for i in range(len(arrays))]
    for name, array in zip(names, arrays, strict=True):
        Path(name).write_bytes(array.contiguous().view(torch.uint8).numpy().tobytes())
    sizes = [str(n) for n in (DTYPES[arrays[0].dtype], *arrays[0].shape, *numbers)]
    environment = {**os.environ, "CUDA_ON_CPU_ORDER": order}
    environment |= {"OFFSET": "1"} if offset else {}
    command = [str(program), direction, *sizes, *names, str(folder / "result")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    bits = bytearray((folder / "result").read_bytes())
    return torch.frombuffer(bits, dtype=arrays[0].dtype).view(arrays[0].shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax(program, shape, dtype):
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape).mul(4).to(dtype).unbind()
    scale = 0.5
    wide = x.double().requires_grad_()
    truth = softmax_reference(wide, -1, scale, None, False)
    eager = softmax_reference(x, -1, scale, None, False)
    y = run(program, "forward", (0, scale), x)
    assert_no_worse(y, eager, truth, what="y")
    assert torch.equal(run(program, "forward", (0, scale), x, order="reverse"), y)

    (dtruth,) = torch.autograd.grad(truth, wide, dy.double())
    narrow = x.clone().requires_grad_()
    (deager,) = torch.autograd.grad(softmax_reference(narrow, -1, scale, None, False), narrow, dy)
    dx = run(program, "backward", (scale,), dy, y)
    assert_no_worse(dx, deager, dtruth, what="dx")
    assert torch.equal(run(program, "backward", (scale,), dy, y, order="reverse"), dx)


@pytest.mark.parametrize("shape", [(7, 7), (6, 130), (40, 1100)], ids=str)
def test_causal_rows_see_their_own_index(program, shape):
    torch.manual_seed(1)
    period = shape[0] // 2
    x = torch.randn(period * 2, shape[1])
    y = run(program, "forward", (period, -1.5), x)
    expected = softmax_reference(x.view(2, period, -1).double(), -1, -1.5, None, True).view_as(x)
    assert_no_worse(
        y, softmax_reference(x.view(2, period, -1), -1, -1.5, None, True).view_as(x), expected
    )


def test_unaligned_rows_take_the_narrow_path(program):
    x = torch.randn(3, 1032)
    truth = softmax_reference(x.double(), -1, 1.0, None, False)
    shifted = run(program, "forward", (0, 1.0), x, offset=True)
    assert_no_worse(shifted, softmax_reference(x, -1, 1.0, None, False), truth)


@pytest.mark.parametrize("N", [40, 1200])
def test_not_finite_rows(program, N):
    x = torch.randn(6, N)
    x[0, 3], x[1, 5], x[2, 7] = float("nan"), float("inf"), -float("inf")
    x[3] = -float("inf")
    x[4, : N // 2] = -float("inf")
    y = run(program, "forward", (0, 1.0), x)
    expected = softmax_reference(x, -1, 1.0, None, False)
    assert torch.equal(y.isnan(), expected.isnan())
    assert_no_worse(y, expected, softmax_reference(x.double(), -1, 1.0, None, False))
