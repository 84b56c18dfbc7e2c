"""What all CPU kernels share: where memory runs out, what they keep, how many threads they use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import slimkernels as sk

pytest.importorskip("slimkernels._cpu")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

START = """
import resource
import torch
import slimkernels as sk
from slimkernels.ops.cross_entropy import cross_entropy_forward

MiB = 2**20
forced = sk.use_backend("cpu")
forced.__enter__()
torch.set_num_threads(2)
bfloat16 = torch.bfloat16

def pages(field):
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[field]) * resource.getpagesize()

def room_for(size):
    resource.setrlimit(resource.RLIMIT_AS, (pages(0) + size, resource.RLIM_INFINITY))

def attention(B, Tq, Tk, D):
    shapes = (B, 1, Tq, D), (B, 1, Tk, D), (B, 1, Tk, D)
    q, k, v = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    return sk.scaled_dot_product_attention(q, k, v)

attention(1, 300, 300, 64).sum().backward()  # starts the threads
"""

# In each the kernel's own memory is several times that of the tensors that the call returns.
CALLS = {
    "widened parameters": """
x, w = torch.zeros(1, 64 * MiB, dtype=bfloat16), torch.zeros(64 * MiB, dtype=bfloat16)
room_for(192 * MiB)
sk.layer_norm(x, x.shape[-1:], w)
""",
    "sums of gradients": """
x, b = (torch.zeros(n, 64 * MiB, dtype=bfloat16).squeeze(0).requires_grad_() for n in (1, 1))
y = sk.layer_norm(x[None], x.shape, None, b)
room_for(448 * MiB)
y.backward(torch.zeros(1, 1, dtype=bfloat16).expand_as(y))
""",
    "cross_entropy": """
x, target = torch.zeros(16 * MiB, 1), torch.zeros(16 * MiB, dtype=torch.int64)
room_for(352 * MiB)
cross_entropy_forward(x, target, None, -100, "none", 0.0, 0.0, 0.0, False, "cpu")
""",
    "list of sequences": """
q = torch.zeros(16 * MiB, 1, 1, 1)
room_for(256 * MiB)
sk.scaled_dot_product_attention(q, q, q)
""",
    "attention": """
q = torch.zeros(4, 1, 17, MiB // 4)
room_for(192 * MiB)
sk.scaled_dot_product_attention(q, q, q)
""",
    "attention of few queries": """
q = torch.zeros(4, 1, 1, 4 * MiB)
room_for(128 * MiB)
sk.scaled_dot_product_attention(q, q, q)
""",
    "attention of few queries, a thread's memory": """
q, k, v = torch.zeros(1, 16, 1, 8 * MiB), *torch.zeros(2, 1, 1, 1, 8 * MiB)
v = v[..., :1]
room_for(256 * MiB)
sk.scaled_dot_product_attention(q, k, v, enable_gqa=True)
""",
    "attention's gradient": """
y = attention(4, 1, 1, MiB)
room_for(128 * MiB)
y.backward(y.detach())
""",
}


def python(code: str) -> subprocess.CompletedProcess:
    root = str(Path(sk.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root}
    command = [sys.executable, "-c", START + code]
    # Elsewhere: in the checkout Python would find the source folder before the installed package.
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.sep)


@linux_only
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_memory_is_memory_error(call):
    done = python(call)
    assert done.returncode == 1, (done.returncode, done.stderr[-500:])
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("MemoryError: slimkernels: not enough memory"), done.stderr[-1500:]


@linux_only
def test_a_long_sequence_leaves_no_memory_behind():
    # 384 MiB of scratch: three rows of 64 floats a query.
    code = """
before = pages(1)
attention(1, 2**19, 1, 64).sum().backward()
print((pages(1) - before) // MiB)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr[-1500:]
    assert int(done.stdout) < 64


@linux_only
def test_threads_of_the_caller_obey_set_num_threads():
    code = """
import os, threading
torch.set_num_threads(1)
x = torch.zeros(512, 1024, dtype=bfloat16)

def call():
    before = set(os.listdir("/proc/self/task"))
    sk.layer_norm(x, 1024)
    print(len(set(os.listdir("/proc/self/task")) - before))

thread = threading.Thread(target=call)
thread.start()
thread.join()
"""
    done = python(code)
    assert done.stdout == "0\n", done.stderr[-1500:]
