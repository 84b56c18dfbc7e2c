#!/usr/bin/env python3
"""Compile a @triton.jit kernel for a GPU that is not there, and say what came out.

No GPU, no driver and no torch needed (torch only if the kernel's module imports it).
Checked with triton 3.6.0 (the H200 image's) and 3.9.0, Python 3.11, x86_64.

As a library (a pytest can assert on the Report):

    from aot_check import aot_check
    r = aot_check(attn_fwd,
                  signature={"Q": "*bf16", "K": "*bf16", "O": "*bf16", "scale": "fp32", "sn": "i32", "N": "i32"},
                  constexprs={"BM": 128, "BN": 64, "D": 64},
                  num_warps=4, num_stages=3)            # arch=90 by default
    assert r.wgmma and not r.spill_stores and r.smem <= 227 * 1024
    print(r)

From a shell (several --num-warps / --num-stages / --const values sweep):

    python aot_check.py path/to/kernels.py:attn_fwd \
        --sig 'Q=*bf16 K=*bf16 V=*bf16 O=*bf16 L=*fp32 scale=fp32 sz=i32 sh=i32 sn=i32 H=i32/1 N=i32' \
        --const BM=128 BN=64,128 D=64 CAUSAL=True --num-warps 4,8 --num-stages 2,3 [--keep DIR]

Types: *bf16 *fp16 *fp32 *i32 *i64 (pointers), i32 i64 u32 fp32 i1 (scalars), 'tensordesc<bf16[128,64]>' (a
TensorDescriptor made on the host: TMA), a callable name cannot be given here.  '/16' after a type = divisible by 16
(the default for every pointer and every i32/i64, which is what the JIT finds for well-shaped inputs), '/1' = not.
An int argument equal to 1 is made a constant by the JIT: pass it with --const to see that code.

What the numbers mean on sm_90: regs <= 255/thread; 65,536 regs and 228 KB shared memory a multiprocessor (227 KB a
block); spills or LDL/STL > 0 = register pressure; 'wgmma' must be > 0 for a fast matrix kernel (HGMMA in SASS), an
'mma.sync' count > 0 on sm_90 means the slow Ampere path; TMA = cp.async.bulk.tensor (UTMALDG/UTMASTG in SASS).
"""

from __future__ import annotations
import argparse, ast, contextlib, dataclasses, importlib, importlib.util, io, itertools, os, re, subprocess, sys, tempfile, time

os.environ.pop(
    "TRITON_INTERPRET", None
)  # must be off before triton is imported: @jit objects differ
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

# per-multiprocessor limits: registers, shared memory, shared memory a block, warps, blocks
LIMITS = {
    80: (65536, 164 * 1024, 163 * 1024, 64, 32),
    86: (65536, 100 * 1024, 99 * 1024, 48, 16),
    89: (65536, 100 * 1024, 99 * 1024, 48, 24),
    90: (65536, 228 * 1024, 227 * 1024, 64, 32),
    100: (65536, 228 * 1024, 227 * 1024, 64, 32),
    120: (65536, 100 * 1024, 99 * 1024, 48, 24),
}


@dataclasses.dataclass
class Report:
    name: str
    arch: int
    num_warps: int  # as asked
    total_warps: int  # with the extra warps that warp specialisation adds
    num_stages: int
    constexprs: dict
    compile_s: float
    regs: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    smem: int = 0
    blocks_per_sm: int = 0
    ptx: dict = dataclasses.field(default_factory=dict)
    sass: dict = dataclasses.field(default_factory=dict)
    ptxas_warnings: list = dataclasses.field(default_factory=list)
    asm: dict = dataclasses.field(
        default_factory=dict, repr=False
    )  # 'ttir','ttgir','llir','ptx' text, 'cubin' bytes
    sass_text: str = dataclasses.field(default="", repr=False)

    @property
    def wgmma(self):
        return self.ptx.get("wgmma", 0)

    @property
    def tma(self):
        return self.ptx.get("tma_load", 0) + self.ptx.get("tma_store", 0)

    def __str__(self):
        c = ",".join(f"{k}={v}" for k, v in self.constexprs.items() if not callable(v))
        p = " ".join(f"{k}:{v}" for k, v in self.ptx.items() if v)
        s = " ".join(f"{k}:{v}" for k, v in self.sass.items() if v)
        w = (
            self.num_warps
            if self.total_warps == self.num_warps
            else f"{self.num_warps}(+{self.total_warps - self.num_warps})"
        )
        out = (
            f"{self.name} sm_{self.arch} warps={w} stages={self.num_stages} [{c}] {self.compile_s:.1f}s\n"
            f"  regs {self.regs}  spill st/ld {self.spill_stores}/{self.spill_loads} B  stack {self.stack} B  "
            f"smem {self.smem} B  blocks/SM {self.blocks_per_sm} ({self.blocks_per_sm * self.total_warps} warps)\n"
            f"  PTX  {p}\n  SASS {s}"
        )
        for x in self.ptxas_warnings:
            out += f"\n  ptxas: {x}"
        if self.smem > LIMITS.get(self.arch, LIMITS[90])[2]:
            out += "\n  !! more shared memory than a block may have: the launch would raise OutOfResources"
        return out


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
SASS_COUNTS = {
    k: rf"\b{k}\b"
    for k in (
        "HGMMA",
        "QGMMA",
        "IGMMA",
        "UTCHMMA",
        "HMMA",
        "FFMA",
        "UTMALDG",
        "UTMASTG",
        "LDGSTS",
        "LDG",
        "STG",
        "LDS",
        "STS",
        "LDSM",
        "STSM",
        "LDL",
        "STL",
        "MUFU",
        "SHFL",
        "SYNCS",
        "BAR",
        "USETMAXREG",
        "WARPGROUP",
        "RED",
        "ATOMG",
    )
}


def _split(t):
    """'*bf16/1' -> ('*bf16', None); default divisible by 16 for pointers and integers."""
    t, _, d = t.partition("/")
    if d:
        return t, int(d) if int(d) > 1 else None
    return t, 16 if (t[0] == "*" or t in ("i32", "i64", "u32", "u64")) else None


def _blocks_per_sm(arch, regs, smem, warps):
    R, S, _, W, Bk = LIMITS.get(arch, LIMITS[90])
    per_warp = -(-max(regs, 1) * 32 // 256) * 256
    by_regs = (R // per_warp) // warps
    by_smem = S // (-(-(smem + 1024) // 128) * 128)
    return max(0, min(by_regs, by_smem, W // warps, Bk))


@contextlib.contextmanager
def _quiet_stderr(path):
    """MLIR prints its diagnostics (the whole module) straight to file descriptor 2: keep them in a file."""
    sys.stderr.flush()
    saved, f = os.dup(2), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(f, 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(f)


def aot_check(
    fn, signature, constexprs=None, num_warps=4, num_stages=3, arch=90, options=None, keep=None
) -> Report:
    constexprs = dict(constexprs or {})
    while not isinstance(fn, triton.runtime.jit.JITFunction):  # under @autotune / @heuristics
        fn = fn.fn
    names = fn.arg_names
    sig, attrs, cst = {}, {}, {}
    for i, n in enumerate(names):
        if n in constexprs:
            sig[n] = "constexpr"
            cst[(i,)] = constexprs[n]
        elif n in signature:
            sig[n], d = _split(signature[n])
            if d:
                attrs[(i,)] = [["tt.divisibility", d]]
        else:
            p = fn.params[i]
            if not p.has_default:
                raise ValueError(f"{fn.__name__}: no type and no constant for argument {n!r}")
            sig[n] = "constexpr"
            cst[(i,)] = p.default
    make = ASTSource
    if fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as make
    src = make(fn=fn, signature=sig, constexprs=cst, attrs=attrs)
    opts = {"num_warps": num_warps, "num_stages": num_stages, **(options or {})}
    with tempfile.TemporaryDirectory() as tmp:
        old = {k: os.environ.get(k) for k in ("TRITON_CACHE_DIR", "TRITON_ALWAYS_COMPILE")}
        os.environ.update(TRITON_CACHE_DIR=tmp, TRITON_ALWAYS_COMPILE="1")
        log, err = io.StringIO(), os.path.join(tmp, "stderr")
        knob, triton.knobs.nvidia.dump_ptxas_log = (
            triton.knobs.nvidia.dump_ptxas_log,
            True,
        )  # ptxas -v's own report
        t = time.perf_counter()
        try:
            with contextlib.redirect_stdout(log), _quiet_stderr(err):
                k = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=opts)
        except BaseException as e:
            said = [
                l
                for l in open(err, errors="replace").read().splitlines()
                if "error:" in l or "note: Pipeline failed" in l
            ]
            said += [l for l in log.getvalue().splitlines() if "error" in l.lower()][:5]
            cause = e
            while cause.__cause__ is not None:
                cause = cause.__cause__
            said += [f"cause: {type(cause).__name__}: {cause}"[-600:]] if cause is not e else []
            raise RuntimeError(
                f"{type(e).__name__}: {e}" + "".join("\n    " + l[:300] for l in said[:6])
            ) from e
        finally:
            triton.knobs.nvidia.dump_ptxas_log = knob
            for a, b in old.items():
                os.environ.pop(a, None) if b is None else os.environ.__setitem__(a, b)
        log = log.getvalue()
        dt = time.perf_counter() - t
        m = k.metadata
        total = getattr(m, "total_num_warps", None) or m.num_warps
        asm = {a: k.asm[a] for a in ("ttir", "ttgir", "llir", "ptx", "cubin") if a in k.asm}
        r = Report(
            fn.__name__, arch, num_warps, total, num_stages, constexprs, dt, smem=m.shared, asm=asm
        )
        ptx = asm["ptx"]
        mt = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", ptx)
        if mt:
            r.total_warps = max(r.total_warps, int(mt.group(1)) // 32)
        r.ptx = {a: len(re.findall(b, ptx)) for a, b in PTX_COUNTS.items()}
        cf = os.path.join(tmp, "k.cubin")
        with open(cf, "wb") as f:
            f.write(asm["cubin"])
        g = lambda pat: max([int(x) for x in re.findall(pat, log)] or [0])
        r.regs, r.stack = g(r"Used (\d+) registers"), g(r"(\d+) bytes stack frame")
        r.spill_stores, r.spill_loads = (
            g(r"(\d+) bytes spill stores"),
            g(r"(\d+) bytes spill loads"),
        )
        r.ptxas_warnings = [
            l.strip() for l in log.splitlines() if "arning" in l or "serializ" in l or "C75" in l
        ]
        s = subprocess.run(
            [os.path.join(BIN, "nvdisasm"), "-c", cf], capture_output=True, text=True
        )
        if s.returncode:  # newer cubins than nvdisasm knows
            s = subprocess.run(
                [os.path.join(BIN, "cuobjdump"), "-sass", cf], capture_output=True, text=True
            )
        r.sass_text = s.stdout
        r.sass = {a: len(re.findall(b, s.stdout)) for a, b in SASS_COUNTS.items()}
        r.blocks_per_sm = _blocks_per_sm(arch, r.regs, r.smem, r.total_warps)
        if keep:
            os.makedirs(keep, exist_ok=True)
            base = os.path.join(keep, f"{fn.__name__}_sm{arch}_w{num_warps}_s{num_stages}")
            for a, b in asm.items():
                open(f"{base}.{a}", "wb" if isinstance(b, bytes) else "w").write(b)
            open(base + ".sass", "w").write(r.sass_text)
            open(base + ".ptxas.log", "w").write(log)
    return r


def _load(spec):
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
        s = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
        mod = importlib.util.module_from_spec(s)
        sys.modules[s.name] = mod
        s.loader.exec_module(mod)
    else:
        mod = importlib.import_module(path)
    return getattr(mod, name)


def _lit(x):
    try:
        return ast.literal_eval(x)
    except (ValueError, SyntaxError):
        return x


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("kernel", help="file.py:kernel or package.module:kernel")
    p.add_argument("--sig", required=True, help="'X=*bf16 N=i32 ...'")
    p.add_argument("--const", nargs="*", default=[], help="NAME=value[,value...]")
    p.add_argument("--num-warps", default="4")
    p.add_argument("--num-stages", default="3")
    p.add_argument("--arch", default="90")
    p.add_argument("--opt", nargs="*", default=[], help="backend options, e.g. maxnreg=168")
    p.add_argument("--keep", help="folder for the .ttgir/.ptx/.cubin/.sass")
    a = p.parse_args(argv)
    fn = _load(a.kernel)
    sig = dict(x.split("=", 1) for x in a.sig.split())
    cs = [(x.split("=", 1)[0], [_lit(v) for v in x.split("=", 1)[1].split(",")]) for x in a.const]
    opt = {k: _lit(v) for k, v in (x.split("=", 1) for x in a.opt)}
    bad = 0
    for arch, w, st, *vals in itertools.product(
        [int(x) for x in a.arch.split(",")],
        [int(x) for x in a.num_warps.split(",")],
        [int(x) for x in a.num_stages.split(",")],
        *[v for _, v in cs],
    ):
        c = dict(zip([n for n, _ in cs], vals))
        try:
            print(aot_check(fn, sig, c, w, st, arch, opt, a.keep), flush=True)
        except Exception as e:
            bad += 1
            print(
                f"{fn} sm_{arch} warps={w} stages={st} {c}\n  FAILED {type(e).__name__}: {str(e)[-1500:]}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
