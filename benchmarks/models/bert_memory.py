"""Peak memory of a provider of bert_training.py or families.py, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

import torch

from benchmarks import allocator
from benchmarks.models import bert_providers
from benchmarks.models.bert_providers import PRECISIONS, Shape


def peak_memory(name: str, shape: Shape, dtype: str, device: torch.device) -> float:
    """MiB at the peak of two training steps of a provider of bert_training.py."""
    return in_own_process(_steps, (name, shape, dtype, str(device)), device)


def in_own_process(function: Callable, arguments: tuple, device: torch.device) -> float:
    """MiB at the peak of function(*arguments) in a process that does nothing else.

    On a CPU resident memory with Python and torch in it; on a GPU what torch allocated there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", __name__])
    given = function, arguments, str(device), torch.get_num_threads()
    with context.Pool(1) as pool:
        return pool.apply(_peak_of, given)


def _steps(name: str, shape: Shape, dtype: str, device_name: str) -> None:
    batch = bert_providers.batch_of(shape, torch.device(device_name))
    (provider,) = bert_providers.providers([name], shape, PRECISIONS[dtype], batch)
    for _ in range(2):
        provider.step()


def _peak_of(function: Callable, arguments: tuple, device_name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    function(*arguments)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
