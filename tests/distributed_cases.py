"""Hugging Face's models, swapped, in a group of two processes: what two steps give."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from hf_families import FAMILIES
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import slimkernels
from slimkernels.dispatch import OPS
from slimkernels.integrations import _hf_mask
from slimkernels.nn import _torchs_own

RANKS = 2
LAYERS = {"bert-mlm": "bert.encoder.layer", "llama": "model.layers"}
CASES = [
    (family, wrapper, first)
    for family in LAYERS
    for wrapper in ("DistributedDataParallel", "fully_shard")
    for first in ("replace", wrapper)
]


def batch_of(family: str, rank: int) -> dict[str, Tensor | bool]:
    """Each rank's own two rows, of other lengths."""
    batch = {name: t[rank : rank + 2] for name, t in FAMILIES[family].inputs().items()}
    # As in the Trainer: a decoder that caches keeps its padding.
    return batch | ({"use_cache": False} if family == "llama" else {})


def two_steps(model: nn.Module, batch: dict[str, Tensor | bool]) -> dict[str, Tensor]:
    """Both losses, and the gradients of the second; under the model's own names."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    results = {}
    for i in range(2):
        optimizer.zero_grad()
        results[f"loss {i}"] = (loss := model(**batch).loss).detach()
        loss.backward()
        if i == 0:
            optimizer.step()
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        results[name.removeprefix("module.")] = grad
    return results


def alone(family: str, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """What each rank of a group should get, from the model itself in one process."""
    models = [FAMILIES[family].make().train().to(dtype) for _ in range(RANKS)]
    batches = [batch_of(family, rank) for rank in range(RANKS)]
    losses: list[dict[str, Tensor]] = [{} for _ in range(RANKS)]
    for i in range(2):
        for rank, (model, batch) in enumerate(zip(models, batches, strict=True)):
            model.zero_grad()
            losses[rank][f"loss {i}"] = (loss := model(**batch).loss).detach()
            loss.backward()
        same = list(zip(*(m.parameters() for m in models), strict=True))
        means = [torch.stack([p.grad for p in ps]).mean(0) for ps in same]
        if i == 0:
            with torch.no_grad():
                for ps, mean in zip(same, means, strict=True):
                    for p in ps:
                        p -= 0.01 * mean
    names = [name for name, _ in models[0].named_parameters()]
    gradients = dict(zip(names, means, strict=True))
    return [each | gradients for each in losses]


def in_group(rank: int, meeting: Path) -> dict[tuple, dict[str, Tensor] | Exception]:
    """Every case's results on this rank, or what it raised; both ranks must call this."""
    store, limit = dist.FileStore(str(meeting), RANKS), timedelta(seconds=120)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        return {case: _tried(mesh, *case) for case in CASES}
    finally:
        dist.destroy_process_group()


def _tried(mesh, family, wrapper, first):
    try:
        model = FAMILIES[family].make().train()
        if first == "replace":
            swapped = slimkernels.replace(model).swapped
        if wrapper == "fully_shard":
            for layer in model.get_submodule(LAYERS[family]):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = nn.parallel.DistributedDataParallel(model)
        if first != "replace":
            swapped = slimkernels.replace(model).swapped
        begin = _hf_mask.Packing.begin
        with mock.patch.object(_hf_mask.Packing, "begin", side_effect=begin) as spy:
            results = two_steps(model, batch_of(family, dist.get_rank()))
        return results | {"swapped": len(swapped), "packed": spy.call_count}
    except Exception as error:  # so that the other rank does not wait for this one's next case
        return error


def child(rank: int, meeting: Path) -> None:
    """in_group() in a process of its own, where the kernels run at every size as in a test."""
    torch.set_num_threads(1)
    _torchs_own.MIN_ELEMENTS = 0
    for op in OPS.values():
        module = op.modules.get("cpu")
        for name in () if module is None or isinstance(module, str) else vars(module):
            if name.startswith("MIN_"):
                setattr(module, name, 0)
    in_group(rank, meeting)
