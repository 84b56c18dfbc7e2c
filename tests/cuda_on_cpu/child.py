"""The process that harness.Child starts: python child.py FOLDER, requests and answers by pickle."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch


def load(name: str, path: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def install(folder: str) -> None:
    """Makes the extension in `folder` slimkernels._cuda, and CPU tensors what its kernels take."""
    load("slimkernels._cuda", f"{folder}/_cuda.so")
    import slimkernels  # noqa: F401  after its extension
    from slimkernels.backends.cuda import _common

    def unsupported_tensor(x, *args):
        """The refusals but that of the device."""
        refusal = real(x, *args)
        is_of_device = refusal is not None and refusal.startswith("it needs CUDA tensors")
        return None if is_of_device and x.dtype in _common.DTYPES else refusal

    real = _common.unsupported_tensor
    for name, module in list(sys.modules.items()):
        if name.startswith("slimkernels.backends.cuda."):
            for stub in (unsupported_tensor, launch_place, capability):
                if hasattr(module, stub.__name__):
                    setattr(module, stub.__name__, stub)


def launch_place(x):
    return 0, 0


def capability(x):
    return 9, 0


def answer(path: str, function: str, kwargs: dict) -> tuple[str, object]:
    try:
        name = f"cuda_on_cpu_case_{Path(path).stem}"
        module = sys.modules.get(name) or load(name, path)
        in_both_orders(getattr(module, function), kwargs)
        return "passed", None
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except Exception:
        return "failed", traceback.format_exc()


def in_both_orders(function, kwargs: dict) -> None:
    results = []
    for order in ("forward", "reverse"):
        os.environ["CUDA_ON_CPU_ORDER"] = order
        os.environ.pop("CUDA_ON_CPU_RESIDENT", None)
        torch.manual_seed(0)
        results.append(tensors_in(function(**kwargs)))
    for i, (first, second) in enumerate(zip(*results, strict=True)):
        same = torch.equal(first.view(torch.uint8), second.view(torch.uint8))
        assert same, f"result {i} depends on the order in which threads run"


def tensors_in(result: object) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result.detach().contiguous().flatten()]
    values = result.values() if isinstance(result, dict) else result or ()
    return [tensor for value in values for tensor in tensors_in(value)]


def main() -> None:
    # What a kernel or a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.path.append(str(Path(__file__).parents[2]))  # last: an installed slimkernels comes first
    install(sys.argv[1])
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory is NaN
    warnings.filterwarnings("ignore", ".*deterministic.*")
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(answer(*request), answers)
        answers.flush()


if __name__ == "__main__":
    main()
