"""What `slimkernels tune attention` measures: a call for each entry, and whether it is right.

The call is causal, as a decoder's, with 4096 tokens and 1024 / width heads of each width; a rich
one has dropout and a bias for every head. Entries that share a call share this work.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from slimkernels import __version__
from slimkernels.backends.triton import _attention_tiles as tiles
from slimkernels.backends.triton import _attention_tuning as tuning
from slimkernels.dispatch import OPS
from slimkernels.ops._attention_reference import scaled_dot_product_attention_reference
from slimkernels.ops._dropout import draw_seed

NAME = "scaled_dot_product_attention"


class Sizes(NamedTuple):
    """Of the calls that are timed and, with the same strides but shorter, checked."""

    batch: int = 4
    tokens: int = 4096
    # A multiple of 16 like the other: Triton compiles strides that are none anew. Not one of the
    # blocks: their edges are in it.
    checked_tokens: int = 208
    channels: int = 1024


class Case:
    """Each kernel of one dtype, kind and width, on both calls."""

    def __init__(self, dtype: str, kind: str, width: str, sizes: Sizes, device: torch.device):
        torch.manual_seed(0)
        width, dtype = int(width), {"half": torch.bfloat16, "float": torch.float32}[dtype]
        heads, rich = max(sizes.channels // width, 1), kind == "rich"
        self.small, self.large = (
            _inputs((sizes.batch, heads, tokens, width), rich, dtype, device)
            for tokens in (sizes.checked_tokens, sizes.tokens)
        )
        self.truth = _definition(self.small, torch.float64)
        self.eager = _definition(self.small, dtype)
        self.runs = tuning.launches(*self.large)
        self.small_runs = tuning.launches(*self.small)

    def is_right(self, kernel: str) -> bool:
        """Errs at most twice as much as plain PyTorch in the same dtype, against float64.

        The rule that the library's tests have for every kernel; the floor is one unit in the last
        place of the largest value.
        """
        found, truth, eager = self.small_runs[kernel](), self.truth[kernel], self.eager[kernel]
        return all(
            _error(x, right) <= 2 * _error(plain, right) + _ulp(x) * float(right.abs().max())
            for x, right, plain in zip(found, truth, eager, strict=True)
        )


def _inputs(shape, rich, dtype, device):
    """query, key, value, dy and the checked call, as tuning.launches() takes them."""
    q, k, v, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    options = dict(is_causal=True)
    if rich:
        bias = torch.randn(1, shape[1], shape[2], shape[2], dtype=dtype, device=device)
        options |= dict(attn_mask=bias, dropout_p=0.1)
    *_, call = OPS[NAME].arguments(q, k, v, **options)
    return q, k, v, dy, call._replace(seed=draw_seed(device)) if rich else call


def _definition(inputs, dtype) -> dict[str, tuple[Tensor, ...]]:
    """What every kernel should compute, from the op's definition, in `dtype`."""
    *tensors, dy, call = inputs
    tensors = [*tensors, *([] if call.bias is None else [call.bias])]
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    if call.bias is not None:
        call = call._replace(bias=leaves[3])
    y, _ = scaled_dot_product_attention_reference(*leaves[:3], call, dtype=dtype)
    dq, dk, dv, *dbias = torch.autograd.grad(y, leaves, dy.to(dtype))
    return {"forward": (y.detach(),), "dq": (dq,), "dkdv": (dk, dv), "dbias": tuple(dbias)}


def _error(x: Tensor, truth: Tensor) -> float:
    """The largest; NaN, which is at most nothing, if there is one."""
    return float((x.double() - truth).abs().max())


def _ulp(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


class Session:
    """One table in the making: which entries it lacks, and the search for each."""

    def __init__(self, path: Path, device: torch.device, again: bool) -> None:
        self.path, self.device, self.again = path, device, again
        self.table, self.note = self._begun()
        self.case = self.case_of = None

    def _begun(self) -> tuple[dict, str]:
        """The table as it is, and a sentence about what of it cannot stay."""
        if not self.path.exists():
            return {}, ""
        try:
            table = tiles.read_table(self.path)
        except tiles.TableError:
            if not self.again:
                raise
            return {}, f"{self.path} was damaged and is made anew."
        if not tiles.is_current(table):
            return {}, f"{self.path} was made with another Triton and is made anew."
        return table, ""

    def lacking(self, places: list[tiles.Keys]) -> list[tiles.Keys]:
        """Those of `places` that are to be measured."""
        has = {} if self.again else tiles.entries_of(self.table)
        return [keys for keys in places if keys not in has]

    def in_use(self, keys: tiles.Keys) -> list[int]:
        return tiles.in_use(keys, self.device)

    def measure(self, keys: tiles.Keys, sizes: Sizes, clock: Callable, tick: Callable):
        """Search one entry and write it; the entry in use until now, and what was found."""
        dtype, kind, kernel, width = keys
        if self.case_of != (dtype, kind, width):
            self.case = None  # frees the last one's memory first
            self.case = Case(dtype, kind, width, sizes, self.device)
            self.case_of = (dtype, kind, width)
        before, case = self.in_use(keys), self.case
        is_right = functools.partial(case.is_right, kernel)
        found = tuning.search(keys, before, is_right, case.runs[kernel], clock, tick)
        if found.entry is not None:
            below = self.table
            for key in keys[:-1]:
                below = below.setdefault(key, {})
            below[keys[-1]] = found.entry
            self.write()
        return before, found

    def write(self) -> None:
        name = self.device.type
        if name == "cuda":
            name = torch.cuda.get_device_name(self.device)
        self.table["made"] = {
            "device": name,
            "triton": triton.__version__,
            "slimkernels": __version__,
            "date": datetime.date.today().isoformat(),
        }
        tiles.write_table(self.path, self.table)


def places(quick: bool, kernel: str | None, width: int | None) -> list[tiles.Keys]:
    """The entries that are to be in a table, the most used first."""
    return [
        keys
        for keys in tiles.PLACES
        if not (quick and (keys[0] != "half" or int(keys[3]) > 128))
        and kernel in (None, keys[2])
        and width in (None, int(keys[3]))
    ]
