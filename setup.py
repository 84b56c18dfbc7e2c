"""Builds slimkernels._cpu, and slimkernels._cuda where nvcc is found. No torch at build time.

Neither is required: without a compiler the install succeeds, says so, and the Triton and torch
backends remain. CXX, CUDA_HOME (empty: no CUDA), TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured.
All metadata is in pyproject.toml.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from sysconfig import get_paths

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()

# Slowest first: bindings.cpp takes the last one that the machine has.
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISAS = {"avx2": "-mavx2 -mfma -mf16c", "avx512": AVX512, "avx512bf16": AVX512 + " -mavx512bf16"}
if platform.machine() not in ("x86_64", "AMD64"):
    ISAS = {"base": ""}
BASELINE = {"bindings", "call_memory"}  # sources of csrc/cpu that are compiled once

CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wno-psabi -Wno-ignored-attributes "
    "-Wno-uninitialized -Wno-maybe-uninitialized "  # false alarms in GCC 12's own headers
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
NVCCFLAGS = "-std=c++17 -O3 --expt-relaxed-constexpr -Xcompiler=-fPIC,-fvisibility=hidden"
ARCHITECTURES = ("9.0a", "8.0", "10.0")  # the last that nvcc knows comes as PTX too


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


def architectures(compiler: str) -> list[str]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if wanted:
        return wanted
    done = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True)
    known = [a for a in ARCHITECTURES if f"compute_{a.rstrip('a').replace('.', '')}" in done.stdout]
    return [*known[:-1], f"{known[-1]}+PTX"] if known else list(ARCHITECTURES)


def gencode(compiler: str) -> str:
    flags = []
    for arch in architectures(compiler):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if parts is None:
            raise CompileError(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}; only numbers such as 8.0, 9.0a and 10.0+PTX, "
                "separated by semicolons, are understood"
            )
        number = parts[1] + parts[2]
        codes = [f"sm_{number}", f"compute_{number}"] if parts[3] else [f"sm_{number}"]
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return " ".join(flags)


def built_for(compiler: str) -> str:
    """What the extension says it has code for; backends/cuda refuses other devices."""
    return f'-DSLIM_CUDA_ARCHITECTURES="{" ".join(architectures(compiler))}"'


def in_ninja(path: object) -> str:
    """A path where build.ninja takes one."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def in_command(*words: object) -> str:
    """Words of a command line, where build.ninja takes one; ninja quotes $in and $out itself."""
    return shlex.join(map(str, words)).replace("$", "$$")


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


def cpu_objects(sources: list[str], cxx: str) -> tuple[list[tuple[str, str, str]], str]:
    """(object, source, command that compiles it) of each, and what the linker needs besides."""
    every = " ".join(f"apply({isa})" for isa in ISAS)
    objects = []
    for source in sources:
        if Path(source).stem in BASELINE:
            command = f"{cxx} '-DSLIM_ISA_LIST(apply)={every}'"
            objects.append((f"{Path(source).stem}.o", source, command))
            continue
        for isa, flags in ISAS.items():
            command = f"{cxx} -DSLIM_ISA={isa} {flags}"
            objects.append((f"{Path(source).stem}.{isa}.o", source, command))
    return objects, ""


def cuda_objects(sources: list[str], cxx: str) -> tuple[list[tuple[str, str, str]], str]:
    compiler = nvcc()
    home = cuda_home(compiler)
    libraries = [home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    library = [path for path in libraries if (path / "libcudart_static.a").exists()]
    if not library:
        raise CompileError(f"the CUDA toolkit in {home} has no libcudart_static.a")
    commands = {
        ".cu": f"{in_command(compiler)} {NVCCFLAGS} {gencode(compiler)}",
        ".cpp": f"{cxx} {in_command(f'-I{home}/include', built_for(compiler))}",
    }
    objects = [(f"{Path(s).name}.o", s, commands[Path(s).suffix]) for s in sources]
    return objects, f"{in_command(f'-L{library[0]}')} -lcudart_static -ldl -lrt -lpthread"


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
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        includes = [f"-I{path}" for path in (pybind11_include(folder), get_paths()["include"])]
        plan = cuda_objects if ext.name.endswith("_cuda") else cpu_objects
        objects, libraries = plan(ext.sources, f"{cxx} {CXXFLAGS} {in_command(*includes)}")
        lines = [
            "rule compile",
            "  command = $compiler -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {cxx} -shared -fopenmp $in -o $out -Wl,--exclude-libs,ALL {libraries}",
        ]
        for name, source, command in objects:
            lines.append(f"build {in_ninja(folder / name)}: compile {in_ninja(ROOT / source)}")
            lines.append(f"  compiler = {command}")
        names = " ".join(in_ninja(folder / name) for name, _, _ in objects)
        lines.append(f"build {in_ninja(out)}: link {names}\n")
        (folder / "build.ninja").write_text("\n".join(lines))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        subprocess.check_call([*ninja, "-C", str(folder), "-j", jobs])


def sources(folder: str, *patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for p in patterns for path in (ROOT / folder).glob(p))


extensions = [Extension("slimkernels._cpu", sources("csrc/cpu", "*.cpp"), optional=True)]
if nvcc() and sources("csrc/cuda", "*.cu"):
    cuda_sources = sources("csrc/cuda", "*.cu", "*.cpp")
    extensions.append(Extension("slimkernels._cuda", cuda_sources, optional=True))

setup(ext_modules=extensions, cmdclass={"build_ext": NinjaBuild})
