"""The `slimkernels` command line: finds the command's module and hands it the rest."""

from __future__ import annotations

import importlib
import sys

# The module of each command, imported only when it is asked for, and what it does.
COMMANDS = {
    "doctor": (
        "slimkernels.scripts.doctor",
        "what swapping does to a Hugging Face model, measured",
    ),
    "info": ("slimkernels.info", "what is installed, which backends run here, what is missing"),
    "pretrain": ("slimkernels.scripts.pretrain", "train a BERT from scratch"),
    "tune": ("slimkernels.scripts.tune", "measure the fastest tiles of a kernel on this GPU"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `slimkernels <command> ...` and return the exit status; 2 for a command unknown."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        import slimkernels

        print(f"slimkernels {slimkernels.__version__}")
        return 0
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"slimkernels: unknown command {name!r}; the commands are {known}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "slimkernels":
            raise  # a fault of ours, not a package that is missing
        extra = "hf" if error.name.split(".")[0] == "transformers" else "train"
        sentence = f'slimkernels {name} needs {error.name}: pip install "slimkernels[{extra}]"'
        print(sentence, file=sys.stderr)
        return 1
    return module.main(rest) or 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: slimkernels <command> [options]", "", *lines, "", "--version, --help"]
        + ["slimkernels <command> --help lists a command's options"]
    )


if __name__ == "__main__":
    sys.exit(main())
