"""Which backend runs: the four rules, what explain() says, and what torch.compile makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import device_of, skip_unsupported
from torch._dynamo.testing import CompileCounterWithBackend

import slimkernels as sk
from slimkernels import dispatch
from slimkernels.dispatch import BACKENDS, OPS, Op

ROOT = Path(__file__).parent.parent
X = torch.randn(4, 8)
W = torch.ones(8)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """`code` in a fresh interpreter that finds the package where this one found it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLIMKERNELS", "TRITON_"))}
    code = f"import sys; sys.path.append({str(ROOT)!r})\n{code}"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=clean | environment, capture_output=True, text=True, cwd=os.sep
    )


class FakeBackend:
    """Stands for a backend's module: refuses with `reason`, or runs."""

    def __init__(self, reason=None):
        self.unsupported = lambda *args: reason


@pytest.fixture
def op(monkeypatch):
    """An op whose cuda refuses, whose cpu and triton would run, in the order cuda, cpu, triton."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    modules = {"cuda": FakeBackend("it has a cold"), "cpu": FakeBackend(), "triton": FakeBackend()}
    op = Op("nothing", order=(), arguments=lambda *args: args)
    del OPS["nothing"]
    object.__setattr__(op, "order", ("cuda", "cpu", "triton"))
    op.modules.update(modules)
    return op


# The four rules


def test_the_order_decides_when_nobody_does(op):
    assert op.select() == "cpu"
    op.modules["cpu"].unsupported = lambda: "it is tired"
    assert op.select() == "triton"
    op.modules["triton"] = "it is not installed"
    assert op.select() == "torch"


def test_use_backend_goes_before_the_order_and_the_argument_before_both(op):
    with sk.use_backend("triton"):
        assert op.select() == "triton"
        assert op.select(backend="cpu") == "cpu"
        with sk.use_backend("torch"):
            assert op.select() == "torch"
        assert op.select() == "triton"
        with sk.use_backend(None):
            assert op.select() == "cpu"
    assert op.select() == "cpu"


def test_use_backend_ends_with_its_block_even_on_an_error(op):
    with pytest.raises(KeyError), sk.use_backend("triton"):
        raise KeyError
    assert op.select() == "cpu"


@pytest.mark.parametrize("how", ["argument", "use_backend"])
def test_an_order_that_cannot_be_obeyed_raises_the_reason(op, how):
    sentence = "^nothing: cuda was asked for, but it has a cold$"
    with pytest.raises(sk.BackendError, match=sentence):
        if how == "argument":
            op.select(backend="cuda")
        with sk.use_backend("cuda"):
            op.select()


def test_an_op_whose_kernel_is_a_bonus_leaves_a_refusal_to_torch(op):
    """So that a whole model can be forced onto a backend that has no use for it."""
    object.__setattr__(op, "is_bonus", True)
    with sk.use_backend("cuda"):
        assert op.select() == "torch"
        with pytest.raises(sk.BackendError, match="^nothing: cuda was asked for"):
            op.select(backend="cuda")
    with sk.use_backend("cpu"):
        assert op.select() == "cpu"
    with sk.use_backend("triton"):
        x = torch.randn(3, 4)
        assert torch.equal(sk.linear(x, x), torch.nn.functional.linear(x, x))


def test_a_backend_without_the_kernel_says_so(op):
    del op.modules["triton"]
    with pytest.raises(sk.BackendError, match="but nothing has no triton kernel$"):
        op.select(backend="triton")


def test_unknown_names():
    with pytest.raises(
        ValueError, match="^layer_norm: unknown backend 'tpu'; the backends are cuda,"
    ):
        sk.layer_norm(X, 8, backend="tpu")
    with (
        pytest.raises(ValueError, match="^use_backend: unknown backend 'tpu'"),
        sk.use_backend("tpu"),
    ):
        pass
    with pytest.raises(
        ValueError, match="^explain: unknown op 'layer_nrom'; the ops are add_layer"
    ):
        sk.explain("layer_nrom", X)
    with pytest.raises(ValueError, match="^explain: unknown op 'None'; the ops are"):
        sk.explain(None)
    with pytest.raises(
        ValueError,
        match=r"^explain: unknown op 'torch\.nn\.functional\.layer_norm'.*slimkernels\.layer_norm",
    ):
        sk.explain(torch.nn.functional.layer_norm, X, 8)


def test_the_interpreter_is_never_chosen_by_itself(op, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    op.modules["cpu"] = "it is not installed"
    assert op.select() == "torch"
    assert op.select(backend="triton") == "triton"
    assert "triton Triton's interpreter is for tests" in op.explain()


# The environment variable

ASK = "import torch, slimkernels as sk; print(sk.explain('layer_norm', torch.ones(2, 3), 3))"


def test_environment_variable():
    assert run_python(ASK, SLIMKERNELS_BACKEND="torch").stdout.startswith(
        "layer_norm runs on torch"
    )
    assert run_python(ASK, SLIMKERNELS_BACKEND="").returncode == 0


def test_environment_variable_with_an_unknown_name():
    done = run_python(ASK, SLIMKERNELS_BACKEND="tpu")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ValueError: layer_norm: unknown backend 'tpu' in SLIMKERNELS_BACKEND; the backends"
    )
    told = run_python("import slimkernels; print(slimkernels.info())", SLIMKERNELS_BACKEND="tpu")
    assert told.returncode == 0 and "  forced  tpu\n" in told.stdout


def test_environment_variable_that_cannot_be_obeyed():
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this GPU")
    done = run_python(ASK, SLIMKERNELS_BACKEND="triton")
    sentence = "layer_norm: triton was asked for, but it needs CUDA tensors and input is on cpu"
    assert done.stderr.splitlines()[-1].endswith("BackendError: " + sentence)


# What explain says


def test_explain_lists_every_backend_in_order(op):
    assert op.explain().splitlines() == [
        "nothing runs on cpu",
        "  cuda   it has a cold",
        "  cpu    chosen",
        "  triton could run",
        "  torch  could run",
    ]


def test_explain_agrees_with_the_call_and_takes_the_function_or_its_name():
    text = sk.explain(sk.layer_norm, X, 8, weight=W)
    assert text == sk.explain("layer_norm", X, (8,), W)
    assert (
        text.splitlines()[0]
        == f"layer_norm runs on {OPS['layer_norm'].select(X, W, None, 1e-5, False)}"
    )
    forced = sk.explain(sk.layer_norm, X, 8, backend="torch")
    assert forced.startswith("layer_norm runs on torch")
    with pytest.raises(ValueError, match=r"^layer_norm: weight must have shape \(8,\)"):
        sk.explain(sk.layer_norm, X, 8, weight=W[:3])


def test_explain_gives_the_refusals_of_backends_outside_the_order():
    text = sk.explain(sk.linear, X, X)
    for backend in ("cuda", "triton"):
        assert f"  {backend:<7}torch's own matrix product is the fastest known" in text


def test_select_does_not_read_the_environment(monkeypatch):
    monkeypatch.setenv("SLIMKERNELS_BACKEND", "nonsense")
    assert sk.layer_norm(X, 8).shape == X.shape


# torch.compile and autograd


def test_compiled_code_follows_use_backend():
    """One more graph for a forced backend, and the first one again after the block."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    def normalize(x):
        return sk.layer_norm(x, 8, W)

    compiled = torch.compile(normalize, backend=counter, fullgraph=True)
    free = compiled(X)
    assert counter.frame_count == 1
    with sk.use_backend("torch"):
        forced = compiled(X)
        assert counter.frame_count == 2
    assert torch.equal(compiled(X), free)
    with sk.use_backend("torch"):
        assert torch.equal(compiled(X), forced)
    assert counter.frame_count == 2
    targets = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    if OPS["layer_norm"].select(X, W, None, 1e-5, False) != "torch":
        assert any("layer_norm_forward" in t for t in targets[0])
    assert not any("layer_norm_forward" in t for t in targets[1])


@pytest.mark.parametrize("backend", ["triton", "cuda", "cpu"])
def test_backward_uses_forwards_backend(backend):
    x = X.to(device_of(backend)).requires_grad_()
    skip_unsupported("layer_norm", backend, x, 8)
    with sk.use_backend(backend):
        y = sk.layer_norm(x, 8)
    with sk.use_backend("torch"):
        y.sum().backward()
    assert y.grad_fn.next_functions and x.grad is not None
    node = y.grad_fn
    while type(node).__name__ != "_LayerNormBackward":
        node = node.next_functions[0][0]
    assert node.backend == backend


def test_double_backward_through_the_reference_is_right():
    x = X.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sk.layer_norm(x, 8, backend="torch"), (x,))


# What import needs

BLOCK = "import sys\nfor name in {}: sys.modules[name] = None\n"
USE = """
import torch, slimkernels as sk
y = sk.softmax(torch.randn(3, 4)) + sk.layer_norm(torch.ones(3, 4), 4)
print(sk.explain('layer_norm', torch.ones(2, 3), 3))
print(sk.explain('softmax', torch.ones(2, 3)))
print(sk.info())
"""


@pytest.mark.parametrize(
    "blocked, backend, op, sentence",
    [
        ("triton", "triton", "layer_norm", "import of triton halted"),
        ("slimkernels._cpu", "cpu", "layer_norm", "the C++ extension is not built; reinstall"),
        ("slimkernels._cuda", "cuda", "softmax", "slimkernels was built without CUDA; reinstall"),
    ],
)
def test_import_without_a_backend_says_so_only_when_asked(blocked, backend, op, sentence):
    done = run_python(BLOCK.format([blocked]) + USE)
    assert (done.returncode, done.stderr) == (0, "")
    explained, _, informed = done.stdout.partition("Versions")
    _, _, about_op = explained.partition(f"{op} runs on")
    line = next(x for x in about_op.splitlines() if x.startswith(f"  {backend}"))
    assert sentence in line
    assert sentence in informed
    silent = run_python(BLOCK.format([blocked]) + "import slimkernels")
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")


def test_import_with_no_backend_at_all_runs_on_torch():
    blocked = ["triton", "slimkernels._cpu", "slimkernels._cuda"]
    done = run_python(BLOCK.format(blocked) + USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("layer_norm runs on torch")


def test_import_loads_little_and_asks_no_device():
    """Nothing heavy beside torch and Triton, and CUDA stays off, which no fork would survive."""
    code = """
import torch
for name in ("is_available", "device_count", "get_device_properties", "current_device", "init"):
    def asked(*args, name=name): raise RuntimeError(f"import asks torch.cuda.{name}")
    setattr(torch.cuda, name, asked)
try:
    import triton
except ImportError:
    pass
before = set(sys.modules)
import slimkernels
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
assert not torch.cuda.is_initialized()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    # A frozen list: what the package itself needs, and no tokenizers, transformers or matplotlib.
    light = {m for m in done.stdout.split() if m not in sys.stdlib_module_names}
    assert light <= {"slimkernels", "triton", "torch", "numpy", "_distutils_hack"}, light


def test_every_backend_name_is_explained():
    assert set(BACKENDS) == {"cuda", "triton", "cpu", "torch"}
    for op in OPS.values():
        assert set(op.order) <= set(BACKENDS) - {"torch"}
