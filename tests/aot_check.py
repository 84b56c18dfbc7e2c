"""Compile a @triton.jit kernel for a GPU that is not there, and say what came out.

Needs no GPU, no driver and, unless the kernel's module imports it, no torch. Triton 3.6 to 3.9.

    report = aot_check(_forward_kernel, {"x_ptr": "*bf16", "N": "i32"}, {"BLOCK_N": 1024})
    assert not report.spill_stores and report.smem <= 227 * 1024

    python tests/aot_check.py FILE.py:KERNEL --sig 'x_ptr=*bf16 N=i32 scale=fp32' \\
        --const BLOCK_N=512,1024 --num-warps 4,8 --num-stages 2,3 --arch 80,90,100 [--keep DIR]

Types: *bf16 *fp16 *fp32 *i32 *i64 (pointers), i32 i64 u32 fp32 i1 (scalars), and
'tensordesc<bf16[128,64]>' (a descriptor made on the host); from Python also tuples of these, of
None and of the 1 that an integer may be. Pointers and integers count as
divisible by 16, as the JIT finds for well-shaped inputs; '/1' after a type takes that away. An
integer equal to 1 becomes a constant in the JIT: pass it with --const to see that code.

On sm_90: at most 255 registers a thread, 65536 a multiprocessor, and 227 KiB shared memory a
block; spills, LDL or STL mean register pressure; a fast matrix kernel has wgmma (HGMMA in SASS),
while mma.sync there is the slow Ampere path; TMA is cp.async.bulk.tensor.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Off before triton is imported: an interpreted @triton.jit function cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from aot_memory import accesses, described  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one multiprocessor has."""

    smem: int
    smem_block: int
    warps: int
    blocks: int
    registers: int = 65536


KIB = 1024
LIMITS = {
    80: Limits(164 * KIB, 163 * KIB, 64, 32),
    86: Limits(100 * KIB, 99 * KIB, 48, 16),
    89: Limits(100 * KIB, 99 * KIB, 48, 24),
    90: Limits(228 * KIB, 227 * KIB, 64, 32),
    100: Limits(228 * KIB, 227 * KIB, 64, 32),
    120: Limits(100 * KIB, 99 * KIB, 48, 24),
}

PTX_COUNTS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "tma_load": r"cp\.async\.bulk\.tensor[^;]*shared::(?:cluster|cta)\.global",
    "tma_store": r"cp\.async\.bulk\.tensor[^;]*global\.shared",
    "cp.async": r"\bcp\.async\.c[ag]",
    "mbarrier": r"\bmbarrier\.(?:init|try_wait|arrive)",
    "setmaxnreg": r"\bsetmaxnreg",
    "ld.global.v4": r"ld\.global[^;]*\.v4",
    "ldmatrix": r"\bldmatrix",
    "stmatrix": r"\bstmatrix",
    "atom/red": r"\b(?:atom|red)\.",
    "ex2": r"\bex2\.approx",
    "shfl": r"\bshfl",
    "bar.sync": r"\b(?:bar|barrier)\.sync",
}
SASS_COUNTS = re.compile(
    r"\b(HGMMA|QGMMA|IGMMA|UTCHMMA|HMMA|FFMA|UTMALDG|UTMASTG|LDGSTS|LDG|STG|LDS|STS|LDSM|STSM|LDL"
    r"|STL|MUFU|SHFL|SYNCS|BAR|USETMAXREG|WARPGROUP|RED|ATOMG)\b"
)


@dataclasses.dataclass
class Report:
    """What the compiler made of one kernel on one architecture."""

    name: str
    arch: int
    num_warps: int  # as asked
    total_warps: int  # with those that warp specialisation adds
    num_stages: int
    constexprs: dict
    seconds: float
    regs: int = 0
    stack: int = 0
    spill_stores: int = 0  # bytes
    spill_loads: int = 0
    smem: int = 0
    ptx: dict = dataclasses.field(default_factory=dict)
    sass: dict = dataclasses.field(default_factory=dict)
    # {"load": ..., "store": ...}: what aot_memory.accesses finds.
    memory: dict = dataclasses.field(default_factory=dict)
    ptxas_warnings: list = dataclasses.field(default_factory=list)
    asm: dict = dataclasses.field(default_factory=dict, repr=False)
    sass_text: str = dataclasses.field(default="", repr=False)

    @property
    def wgmma(self) -> int:
        return self.ptx["wgmma"]

    @property
    def mma(self) -> int:
        """Matrix instructions of any generation."""
        return self.ptx["wgmma"] + self.ptx["tcgen05"] + self.ptx["mma.sync"]

    @property
    def smem_limit(self) -> int:
        return LIMITS.get(self.arch, LIMITS[90]).smem_block

    @property
    def blocks_per_sm(self) -> int:
        limits = LIMITS.get(self.arch, LIMITS[90])
        per_warp = -(-max(self.regs, 1) * 32 // 256) * 256  # allocated in units of 256
        by_registers = limits.registers // per_warp // self.total_warps
        by_smem = limits.smem // (-(-(self.smem + KIB) // 128) * 128)
        by_warps = limits.warps // self.total_warps
        return max(0, min(by_registers, by_smem, by_warps, limits.blocks))

    def __str__(self) -> str:
        constants = ",".join(f"{k}={v}" for k, v in self.constexprs.items() if not callable(v))
        extra = self.total_warps - self.num_warps
        warps = f"{self.num_warps}(+{extra})" if extra else str(self.num_warps)
        blocks = self.blocks_per_sm
        lines = [
            f"{self.name} sm_{self.arch} warps={warps} stages={self.num_stages} [{constants}] "
            f"{self.seconds:.1f}s",
            f"  regs {self.regs}  spill st/ld {self.spill_stores}/{self.spill_loads} B  "
            f"stack {self.stack} B  smem {self.smem} B  "
            f"blocks/SM {blocks} ({blocks * self.total_warps} warps)",
            "  PTX  " + " ".join(f"{k}:{v}" for k, v in self.ptx.items() if v),
            "  SASS " + " ".join(f"{k}:{v}" for k, v in self.sass.items() if v),
            *(f"  {described(way, found)}" for way, found in self.memory.items()),
            *(f"  ptxas: {warning}" for warning in self.ptxas_warnings),
        ]
        if self.smem > self.smem_limit:
            lines.append("  too much shared memory for a block: the launch would raise")
        return "\n".join(lines)


def aot_check(
    kernel, signature, constexprs=None, num_warps=4, num_stages=3, arch=90, options=None, keep=None
) -> Report:
    """Compile `kernel` for sm_<arch>; RuntimeError with the compiler's words if it will not.

    signature  {argument: type}; constexprs {argument: value}; other arguments take their default
    options    further backend options, {"maxnreg": 168}
    keep       a folder for the intermediate code
    """
    constexprs = dict(constexprs or {})
    while not isinstance(kernel, triton.runtime.jit.JITFunction):  # under @autotune, @heuristics
        kernel = kernel.fn
    source = _source(kernel, signature, constexprs)
    options = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    start = time.perf_counter()
    compiled, log = _compile(source, arch, options)
    seconds = time.perf_counter() - start

    metadata = compiled.metadata
    asm = {
        k: compiled.asm[k] for k in ("ttir", "ttgir", "llir", "ptx", "cubin") if k in compiled.asm
    }
    ptx, sass = asm["ptx"], _disassemble(asm["cubin"])
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
    total_warps = getattr(metadata, "total_num_warps", None) or metadata.num_warps
    if threads:
        total_warps = max(total_warps, int(threads.group(1)) // 32)

    def most(pattern):
        return max(map(int, re.findall(pattern, log)), default=0)

    report = Report(
        *(kernel.__name__, arch, num_warps, total_warps, num_stages, constexprs, seconds),
        regs=most(r"Used (\d+) registers"),
        stack=most(r"(\d+) bytes stack frame"),
        spill_stores=most(r"(\d+) bytes spill stores"),
        spill_loads=most(r"(\d+) bytes spill loads"),
        smem=metadata.shared,
        ptx={name: len(re.findall(pattern, ptx)) for name, pattern in PTX_COUNTS.items()},
        sass=collections.Counter(SASS_COUNTS.findall(sass)),
        memory={w: accesses(w, asm["ttgir"], sass, 32 * num_warps) for w in ("load", "store")},
        ptxas_warnings=[x.strip() for x in log.splitlines() if re.search("arning|serializ|C75", x)],
        asm=asm,
        sass_text=sass,
    )
    if keep:
        _keep(report, log, Path(keep))
    return report


def _source(kernel, signature, constexprs) -> ASTSource:
    types, attributes, constants = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name not in constexprs and name in signature:
            types[name] = _described(signature[name], (i,), attributes, constants)
            continue
        if name not in constexprs and not kernel.params[i].has_default:
            raise ValueError(f"{kernel.__name__}: no type and no constant for argument {name!r}")
        types[name] = "constexpr"
        constants[(i,)] = constexprs.get(name, kernel.params[i].default)
    make = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as make
    return make(fn=kernel, signature=types, constexprs=constants, attrs=attributes)


def _described(kind, path: tuple[int, ...], attributes: dict, constants: dict):
    """The type of an argument or, in a tuple, of each element; notes divisibility and constants."""
    if isinstance(kind, tuple):
        elements = [_described(k, (*path, i), attributes, constants) for i, k in enumerate(kind)]
        return type(kind)(*elements) if hasattr(kind, "_fields") else tuple(elements)
    if not isinstance(kind, str):
        constants[path] = kind
        return "constexpr"
    name, divisor = _type_and_divisor(kind)
    if divisor:
        attributes[path] = [["tt.divisibility", divisor]]
    return name


def _type_and_divisor(text: str) -> tuple[str, int | None]:
    kind, _, divisor = text.partition("/")
    if divisor:
        return kind, int(divisor) if int(divisor) > 1 else None
    return kind, 16 if kind[0] == "*" or kind in ("i32", "i64", "u32", "u64") else None


def _compile(source, arch, options):
    """The compiled kernel and ptxas's report."""
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, _environment(TRITON_CACHE_DIR=folder):
        errors = Path(folder) / "stderr"
        dump, triton.knobs.nvidia.dump_ptxas_log = triton.knobs.nvidia.dump_ptxas_log, True
        try:
            with contextlib.redirect_stdout(log), _stderr_to(errors):
                target = GPUTarget("cuda", arch, 32)
                return triton.compile(source, target=target, options=options), log.getvalue()
        # Whatever the compiler raises, MLIR's own words are on stderr and ptxas's on stdout.
        except BaseException as error:
            said = re.findall(
                r".*(?:error:|note: Pipeline failed).*", errors.read_text("utf8", "replace")
            )
            said += re.findall(r"(?i).*error.*", log.getvalue())[:5]
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            said += [f"cause: {type(cause).__name__}: {cause}"[-600:]] if cause is not error else []
            lines = "".join("\n    " + line[:300] for line in said[:6])
            raise RuntimeError(f"{type(error).__name__}: {error}{lines}") from error
        finally:
            triton.knobs.nvidia.dump_ptxas_log = dump


@contextlib.contextmanager
def _environment(**variables):
    variables["TRITON_ALWAYS_COMPILE"] = "1"
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _stderr_to(path: Path):
    """MLIR prints whole modules straight to file descriptor 2: keep them in a file."""
    sys.stderr.flush()
    saved = os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # nvdisasm does not know the newest cubins; cuobjdump does.
        for tool, *options in (["nvdisasm", "-c", "-g"], ["cuobjdump", "-sass"]):
            command = [str(TOOLS / tool), *options, file.name]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        return done.stdout


def _keep(report: Report, log: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base = f"{report.name}_sm{report.arch}_w{report.num_warps}_s{report.num_stages}"
    for name, code in {**report.asm, "sass": report.sass_text, "ptxas.log": log}.items():
        (folder / f"{base}.{name}").write_bytes(code if isinstance(code, bytes) else code.encode())


def _load(specification: str):
    path, _, name = specification.rpartition(":")
    if not path.endswith(".py"):
        return getattr(importlib.import_module(path), name)
    file = Path(path).resolve()
    # The file may import its neighbours, or a package in the working directory.
    sys.path[:0] = [str(file.parent), os.getcwd()]
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", help="file.py:kernel or package.module:kernel")
    parser.add_argument("--sig", required=True, help="'x_ptr=*bf16 N=i32 ...'")
    parser.add_argument("--const", nargs="*", default=[], help="NAME=value[,value...]")
    for option, default in (("--num-warps", "4"), ("--num-stages", "3"), ("--arch", "90")):
        parser.add_argument(option, default=default)
    parser.add_argument("--opt", nargs="*", default=[], help="backend options: maxnreg=168")
    parser.add_argument("--keep", help="a folder for the .ttgir, .ptx, .cubin and .sass")
    args = parser.parse_args(argv)
    kernel = _load(args.kernel)
    signature = dict(item.split("=", 1) for item in args.sig.split())
    names, values = [], []
    for item in args.const:
        name, _, choices = item.partition("=")
        names.append(name)
        values.append([_literal(choice) for choice in choices.split(",")])
    options = {k: _literal(v) for k, v in (item.split("=", 1) for item in args.opt)}
    numbers = [[int(n) for n in s.split(",")] for s in (args.arch, args.num_warps, args.num_stages)]
    failed = False
    for arch, warps, stages, *chosen in itertools.product(*numbers, *values):
        constants = dict(zip(names, chosen, strict=True))
        try:
            report = aot_check(
                kernel, signature, constants, warps, stages, arch, options, args.keep
            )
            print(report, flush=True)
        except RuntimeError as error:  # the sweep goes on
            failed = True
            print(f"{kernel} sm_{arch} warps={warps} stages={stages} {constants}")
            print(f"  failed: {str(error)[-1500:]}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
