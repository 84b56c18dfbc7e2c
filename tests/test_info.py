"""slimkernels.info and the command line."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import slimkernels
from slimkernels import dispatch
from slimkernels.scripts import main as command

ROOT = Path(__file__).parent.parent
info_module = sys.modules["slimkernels.info"]  # the attribute of that name is the function


def section(text: str, title: str) -> list[str]:
    """The lines under a title, up to the next one."""
    body = text.split("\n" + title)[-1] if not text.startswith(title) else text[len(title) :]
    return [line.strip() for line in re.split(r"\n(?=\S)", body)[0].splitlines()[1:]]


def test_versions_and_devices():
    text = slimkernels.info()
    versions = dict(line.split(None, 1) for line in section(text, "Versions"))
    assert versions["slimkernels"].startswith(slimkernels.__version__)
    assert versions["torch"] == torch.__version__
    assert versions["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert {"triton", "CUDA", "nvcc"} <= set(versions)
    devices = section(text, "Devices")
    assert f"{torch.get_num_threads()} threads" in devices[-1]
    assert len(devices) == 1 + max(torch.cuda.device_count(), 1)


def test_backends_are_named_with_what_they_can_do():
    backends = dict(line.split(None, 1) for line in section(slimkernels.info(), "Backends"))
    assert list(backends) == list(dispatch.BACKENDS)
    cpu = pytest.importorskip("slimkernels._cpu", reason="the C++ extension is not built")
    assert backends["cpu"].startswith(f"built for {', '.join(cpu.isas_built())}; available")
    assert backends["cpu"].endswith(f"uses {cpu.isa()}")


def test_the_table_of_ops_agrees_with_dispatch():
    header, *rows = section(slimkernels.info(), "Ops")
    names = header.split()
    assert [row.split()[0] for row in rows] == sorted(dispatch.OPS)
    for row in rows:
        op, *cells = row.split()
        for backend, cell in zip(names, cells, strict=True):
            module = dispatch.OPS[op].modules.get(backend)
            if cell == "yes":
                assert backend == "torch" or isinstance(module, types.ModuleType), (op, backend)
            if cell == "-":
                assert not isinstance(module, types.ModuleType), (op, backend)


def test_a_missing_extra_names_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    lines = [line for line in section(slimkernels.info(), "Extras") if line.startswith("train")]
    assert "missing tokenizers" in lines[0] and 'pip install "slimkernels[train]"' in lines[0]


def test_extras_are_those_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    for extra, packages in info_module.EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*?)\]", text, re.M | re.S)
        assert re.findall(r'"([a-z]+)', listed) == list(packages), extra


def test_an_extension_of_another_python_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(info_module, "__file__", str(tmp_path / "info.py"))
    assert info_module._other_python("_cpu") is None
    (tmp_path / "_cpu.cpython-399-x86_64-linux-gnu.so").touch()
    sentence = info_module._other_python("_cpu")
    assert sentence.startswith("_cpu.cpython-399-x86_64-linux-gnu.so was built for another Python")
    assert info_module._other_python("_cuda") is None
    (tmp_path / f"_cpu{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    assert info_module._other_python("_cpu") is None


# The command line


def test_commands(capsys):
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"slimkernels {slimkernels.__version__}\n"
    for argv in ([], ["--help"], ["-h"]):
        assert command.main(argv) == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: slimkernels <command>")
        assert all(f"\n  {name} " in out for name in command.COMMANDS)
    assert command.main(["info"]) == 0
    assert capsys.readouterr().out.startswith("Versions\n")


def test_wrong_commands_are_one_sentence(capsys):
    assert command.main(["pertain"]) == 2
    sentence = (
        "slimkernels: unknown command 'pertain'; the commands are doctor, info, pretrain, tune\n"
    )
    assert capsys.readouterr().err == sentence
    assert command.main(["info", "--all"]) == 2
    assert capsys.readouterr().err == "slimkernels info takes no options; got --all\n"


def test_a_command_gets_its_arguments_and_gives_its_status(monkeypatch):
    seen = []
    module = types.ModuleType("pretrain")
    module.main = lambda argv: seen.append(argv) or 7
    monkeypatch.setitem(sys.modules, "slimkernels.scripts.pretrain", module)
    assert command.main(["pretrain", "--steps", "3"]) == 7
    assert seen == [["--steps", "3"]]


def test_every_command_exists():
    for module, summary in command.COMMANDS.values():
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() and summary


def test_the_version_is_the_projects():
    try:
        installed = importlib.metadata.version("slimkernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout that is not installed")
    assert installed == slimkernels.__version__
