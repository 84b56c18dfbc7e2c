"""Peak memory of a provider of bert_training.py, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource

import torch

from benchmarks import allocator
from benchmarks.models import bert_providers
from benchmarks.models.bert_providers import PRECISIONS, Shape


def peak_memory(name: str, shape: Shape, dtype: str, device: torch.device) -> float:
    """MiB at the peak of two training steps in a process that does nothing else.

    On a CPU resident memory with Python and torch in it; on a GPU what torch allocated there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", __name__])
    with context.Pool(1) as pool:
        return pool.apply(_peak_of, (name, shape, dtype, str(device), torch.get_num_threads()))


def _peak_of(name: str, shape: Shape, dtype: str, device_name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cpu":
        allocator.keep_freed_memory()
    batch = bert_providers.batch_of(shape, device)
    (provider,) = bert_providers.providers([name], shape, PRECISIONS[dtype], batch)
    for _ in range(2):
        provider.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
