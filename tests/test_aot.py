"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, and as well as its module declares.

A module's COMPILES list has one dict a configuration: kernel, signature, constexprs, num_warps,
registers (the most that a thread may need), and where they matter num_stages, smem (the most
bytes of shared memory), wgmma=True (a matrix kernel, which must use Hopper's instructions, and not
one at a time) and may_wait (but loads may come between two of them: "newer" if only a newer Triton
puts them there, or "any"), narrow (how many of the instructions that load and store blocks of 128
bits a thread, or more, take less at a time all the same, and why; without it, none).

Neither the interpreter nor a GPU shares a process with the compiler, so what the selected tests
need is compiled at once, in processes of its own: this file run as a script.
"""

from __future__ import annotations

import ast
import fcntl
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="without Triton nothing can be compiled")

# Tiles are chosen, and registers declared, with the compiler of the oldest supported Triton, which
# CI runs, too. A newer one must compile the same kernels to the same kind of code, and may give
# them a few registers more: it shows that with one configuration of each, in a tenth of the time.
DECLARED_WITH = "3.6"
IS_DECLARED = triton.__version__.startswith(DECLARED_WITH + ".")
ARCHITECTURES = (80, 90, 100) if IS_DECLARED else (90,)
REQUIRED = {"kernel", "signature", "constexprs", "num_warps", "registers"}
OPTIONAL = {"num_stages", "smem", "wgmma", "may_wait", "narrow"}

if __name__ != "__main__":
    import slimkernels.backends.triton as kernels

    ALL_MODULES = sorted(info.name for info in pkgutil.iter_modules(kernels.__path__))
else:
    ALL_MODULES = []
MODULES = [name for name in ALL_MODULES if name[0] != "_"]  # the others are shared by several ops


def load(name):
    return importlib.import_module(f"slimkernels.backends.triton.{name}")


def function_of(kernel):
    """The Python function under @triton.jit, @triton.autotune, @triton.heuristics."""
    while not inspect.isfunction(kernel):
        kernel = kernel.fn
    return kernel


def pointers(types):
    """The pointer types of a signature, those inside tuples too."""
    for kind in types:
        if isinstance(kind, tuple):
            yield from pointers(kind)
        elif isinstance(kind, str) and kind[0] == "*":
            yield kind


def configurations(name):
    """A readable identity for each entry of a module's COMPILES."""
    identities = []
    for config in getattr(load(name), "COMPILES", []):
        constants = ",".join(f"{k}={v}" for k, v in config["constexprs"].items())
        types = sorted({t.strip("*") for t in pointers(config["signature"].values())})
        identities.append(
            f"{function_of(config['kernel']).__name__}[{','.join(types)};{constants}]"
        )
    return identities


def chosen(name):
    """(index, architecture) of what is compiled of a module's COMPILES: the first entry of each
    kernel for every architecture, and so are the others of a module that multiplies matrices; those
    of one that does not for sm_90 only: registers are as many on all three.
    """
    configs = getattr(load(name), "COMPILES", [])
    kernels = [function_of(config["kernel"]) for config in configs]
    multiplies = any(config.get("wgmma") for config in configs)
    pairs = []
    for i, kernel in enumerate(kernels):
        if kernel not in kernels[:i] or (IS_DECLARED and multiplies):
            pairs += [(i, arch) for arch in ARCHITECTURES]
        elif IS_DECLARED:
            pairs.append((i, 90))
    return pairs


CASES = [
    pytest.param(name, i, arch, id=f"{name}-{configurations(name)[i]}-sm_{arch}")
    for name in MODULES
    for i, arch in chosen(name)
]


PROCESSES = 2


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """The report, or the error, of each selected (module, index, architecture)."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with open(folder / "aot_reports.json", "a+") as shared:  # one process of xdist's compiles
        fcntl.flock(shared, fcntl.LOCK_EX)
        shared.seek(0)
        known = shared.read()
        if not known:
            known = json.dumps(compile_selected(request.session.items))
            shared.write(known)
    return {tuple(task): report for task, report in json.loads(known)}


def compile_selected(items):
    tests = [item for item in items if item.path == Path(__file__)]
    parameters = [item.callspec.params for item in tests if hasattr(item, "callspec")]
    tasks = [(p["name"], p["index"], p["arch"]) for p in parameters if "arch" in p]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [
        subprocess.Popen([sys.executable, __file__, json.dumps(tasks[part::PROCESSES])], **options)
        for part in range(PROCESSES)
    ]
    found = []
    for process in started:
        output, errors = process.communicate(timeout=1200)
        assert process.returncode == 0, errors[-3000:]
        found += json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("name, index, arch", CASES)
def test_compiles_as_declared(name, index, arch, reports):
    config = load(name).COMPILES[index]
    report = reports[name, index, arch]
    assert "error" not in report, report["error"]
    described = report["description"]
    if IS_DECLARED:
        assert report["spill_stores"] == report["spill_loads"] == 0, described
        assert report["regs"] <= config["registers"], described
    if IS_DECLARED and arch == 90 and not config.get("wgmma"):  # memory is what others wait for
        declared = config.get("narrow", {})
        assert report["memory"]["load"] or declared, described
        for way, lines in report["memory"].items():
            assert all(counts["wide"] + counts["narrow"] for counts in lines.values()), described
            narrow = sum(counts["narrow"] for counts in lines.values())
            assert narrow == declared.get(way, 0), described
    assert report["smem"] <= min(config.get("smem", report["smem_limit"]), report["smem_limit"])
    if config.get("wgmma"):
        instructions = report["wgmma"] if arch == 90 else report["mma"]
        assert instructions > 0, described
        if config.get("may_wait") in (("any",) if IS_DECLARED else ("any", "newer")):
            return
        # ptxas C7511: wgmma would wait for the one before it.
        assert not [w for w in report["warnings"] if "serializ" in w], described


@pytest.mark.parametrize("name", ALL_MODULES)
def test_every_kernel_is_declared(name):
    declared = {function_of(config["kernel"]) for m in MODULES for config in load(m).COMPILES}
    declared = {f.__name__ for f in declared if f.__module__ == load(name).__name__}
    tree = ast.parse(inspect.getsource(load(name)))
    jitted = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("triton.") for decorator in node.decorator_list)
    }
    launched = {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in jitted
    }
    kernels = {function for function in jitted if function.endswith("_kernel")}
    compiled_for = getattr(load(name), "COMPILES", [])  # perhaps a kernel that several ops share
    assert kernels or compiled_for or name not in MODULES, f"{name} has no kernel"
    assert launched <= kernels, f"launched kernels must be named _kernel: {launched - kernels}"
    assert kernels <= declared, f"not in COMPILES: {sorted(kernels - declared)}"


@pytest.mark.parametrize("name", MODULES)
def test_declarations_are_complete(name):
    for config in load(name).COMPILES:
        keys = set(config)
        assert REQUIRED <= keys <= REQUIRED | OPTIONAL, (config["kernel"], keys)
        assert config.get("narrow", {"why": "-"})["why"]
        parameters = inspect.signature(function_of(config["kernel"])).parameters
        given = {**config["signature"], **config["constexprs"]}
        defaults = {p.name for p in parameters.values() if p.default is not p.empty}
        assert set(given) <= set(parameters) <= set(given) | defaults, config["kernel"]


def report_of(name: str, index: int, arch: int) -> dict:
    from aot_check import aot_check

    config = load(name).COMPILES[index]
    try:
        report = aot_check(
            *(config["kernel"], config["signature"], config["constexprs"]),
            num_warps=config["num_warps"],
            num_stages=config.get("num_stages", 3),
            arch=arch,
        )
    except RuntimeError as error:
        return {"error": str(error)}
    fields = ("regs", "spill_stores", "spill_loads", "smem", "smem_limit", "wgmma", "mma", "memory")
    numbers = {field: getattr(report, field) for field in fields}
    return numbers | {"warnings": report.ptxas_warnings, "description": str(report)}


if __name__ == "__main__":
    # Last, as in conftest.py: an installed slimkernels goes first.
    sys.path.append(str(Path(__file__).parent.parent))
    print(json.dumps([(task, report_of(*task)) for task in json.loads(sys.argv[1])]))
