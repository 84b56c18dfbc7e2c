"""Builds slimkernels._cpu, and slimkernels._cuda where nvcc is found. No torch at build time.

Neither is required: without a compiler the install succeeds, says so, and the Triton and torch
backends remain. CXX, CUDA_HOME (empty: no CUDA), TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
All metadata is in pyproject.toml.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()

# Slowest first: bindings.cpp takes the last one that the machine has.
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISAS = {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512bf16": AVX512 + " -mavx512bf16"}
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"base": ""}

CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wno-psabi -Wno-ignored-attributes "
    "-Wno-uninitialized -Wno-maybe-uninitialized "  # false alarms in GCC 12's own headers
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home is not None:
        return shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_home(compiler: str) -> Path:
    # The nvcc on PATH may be a wrapper script: ask it where its toolkit is.
    dry = subprocess.run([compiler, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = [line[7:].strip() for line in dry.stderr.splitlines() if line.startswith("#$ TOP=")]
    return Path(top[0] if top else os.path.join(os.path.dirname(compiler), "..")).resolve()


def gencode() -> list[str]:
    flags = []
    for arch in os.environ.get("TORCH_CUDA_ARCH_LIST", ARCHITECTURES).replace(" ", ";").split(";"):
        number, _, ptx = arch.replace(".", "").partition("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def pybind11_include(build_dir: Path) -> str:
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    # A machine without network: torch ships the same headers. Link only pybind11's folder, so
    # that no torch header can be included by mistake.
    torch = importlib.util.find_spec("torch")
    headers = Path(torch.submodule_search_locations[0]) / "include/pybind11" if torch else Path()
    if torch is None or not headers.is_dir():
        raise CompileError("pybind11 is missing: pip install pybind11")
    link = build_dir / "include" / "pybind11"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(headers)
    return str(link.parent)


class NinjaBuild(build_ext):
    """One build.ninja an extension: parallel, and rebuilds only what changed."""

    def run(self) -> None:
        if not nvcc():
            print("slimkernels: nvcc was not found, so CUDA is not built", file=sys.stderr)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        try:
            self.ninja_build(ext)
        except (CompileError, subprocess.CalledProcessError, OSError) as error:
            print(f"slimkernels: {ext.name} was not built: {error}", file=sys.stderr)
            raise CompileError(f"{ext.name}: {error}") from error  # forgiven: ext.optional

    def ninja_build(self, ext: Extension) -> None:
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{pybind11_include(build_dir)}", f"-I{sysconfig.get_paths()['include']}"]
        cxx = os.environ.get("CXX", "g++")
        lines = [
            "rule cxx",
            f"  command = {cxx} -MMD -MF $out.d {CXXFLAGS} {shlex.join(includes)} $flags "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -fopenmp $in -o $out -Wl,--exclude-libs,ALL $ldflags",
        ]
        plan = self.cuda if ext.name.endswith("_cuda") else self.cpu
        edges, ldflags = plan(ext, lines)
        lines += [f"build {build_dir / o}: {rule}\n  flags = {flags}" for o, rule, flags in edges]
        names = " ".join(str(build_dir / o) for o, _, _ in edges)
        lines += [f"build {out}: link {names}", f"  ldflags = {ldflags}", f"default {out}", ""]
        (build_dir / "build.ninja").write_text("\n".join(lines))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call([self.ninja(), "-C", str(build_dir), "-j", jobs])

    def cpu(self, ext, lines):
        every = " ".join(f"apply({isa})" for isa in ISAS)
        edges = []
        for source in ext.sources:
            if source.endswith("bindings.cpp"):
                flags = f"'-DSLIM_ISA_LIST(apply)={every}'"
                edges.append(("bindings.o", f"cxx {ROOT / source}", flags))
                continue
            for isa, flags in ISAS.items():
                name = f"{Path(source).stem}.{isa}.o"
                edges.append((name, f"cxx {ROOT / source}", f"-DSLIM_ISA={isa} {flags}"))
        return edges, ""

    def cuda(self, ext, lines):
        compiler = nvcc()
        home = cuda_home(compiler)
        flags = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden"
        lines += [
            "rule nvcc",
            f"  command = {compiler} -MD -MF $out.d {flags} {shlex.join(gencode())} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        edges = []
        for source in ext.sources:
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            edges.append((f"{Path(source).name}.o", f"{rule} {ROOT / source}", f"-I{home}/include"))
        libraries = [home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        library = [path for path in libraries if (path / "libcudart_static.a").exists()]
        if not library:
            raise CompileError(f"the CUDA toolkit in {home} has no libcudart_static.a")
        return edges, f"-L{library[0]} -lcudart_static -ldl -lrt -lpthread"

    @staticmethod
    def ninja() -> str:
        if importlib.util.find_spec("ninja"):
            import ninja

            return os.path.join(ninja.BIN_DIR, "ninja")
        return "ninja"


def sources(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in (ROOT / folder).glob(p))


extensions = [Extension("slimkernels._cpu", sources("csrc/cpu", "*.cpp"), optional=True)]
if nvcc() and sources("csrc/cuda", "*.cu"):
    cuda_sources = sources("csrc/cuda", "*.cu", "*.cpp")
    extensions.append(Extension("slimkernels._cuda", cuda_sources, optional=True))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
