"""That the logits are never all in memory, by what the operating system counts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slimkernels as sk
from slimkernels.ops.linear_cross_entropy import LINEAR_CROSS_ENTROPY

MEMORY = """
import resource, torch, torch.nn.functional as F
import slimkernels as sk
from slimkernels.backends.cpu import linear_cross_entropy as kernels

kernels.CHUNK = 1 << 23
torch.set_num_threads(2)
N, C, V = 2048, 16, 16384
x, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
target = torch.randint(V, (N,))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
for reduction in ("mean", "none"):
    sk.linear_cross_entropy(x, weight, target, reduction=reduction, backend="cpu").sum().backward()
ours = peak()
F.cross_entropy(F.linear(x, weight), target).backward()
print(ours - before, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_memory_is_a_tenth_of_eagers():
    if isinstance(LINEAR_CROSS_ENTROPY.modules["cpu"], str):
        pytest.skip(LINEAR_CROSS_ENTROPY.modules["cpu"])
    environment = {**os.environ, "PYTHONPATH": str(Path(sk.__file__).parent.parent)}
    command = [sys.executable, "-c", MEMORY]
    output = subprocess.check_output(command, env=environment, cwd=os.sep)
    ours, eager = map(int, output.split())
    assert ours * 10 <= eager
