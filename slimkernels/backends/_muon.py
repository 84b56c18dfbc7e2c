"""Muon's products, which are torch's on every backend, and where the kernels put their operands.

All directions of a step lie in one piece of memory, matrices of one shape one after the other: a
stack, orthogonalized in one go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimkernels.backends._tensor_lists import TensorLists

CPU_BATCH = 2**17  # elements
ALIGNMENT = 8  # elements: a matrix begins at a multiple of 16 bytes, in bfloat16


@dataclass(frozen=True)
class Stack:
    """Matrices of one shape: where the first begins, in elements, and from one to the next."""

    start: int
    stride: int
    count: int
    rows: int
    cols: int

    def of(self, directions: Tensor) -> Tensor:
        """(count, rows, cols), a view of the memory of all directions."""
        size = (self.count, self.rows, self.cols)
        return directions.as_strided(size, (self.stride, self.cols, 1), self.start)


@dataclass(frozen=True)
class Plan:
    """Where each direction begins, their stacks, and the elements of all."""

    places: list[int]
    stacks: list[Stack]
    total: int


def plan(lists: TensorLists) -> Plan:
    """The plan of these tensors, made once for as long as their sizes stay."""
    if "muon" not in lists.cut:
        lists.cut["muon"] = _plan(lists)
    return lists.cut["muon"]


def _plan(lists: TensorLists) -> Plan:
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, param in enumerate(lists.columns["param"]):
        # As it lies in memory: a transposed matrix has the transposed direction.
        shape = tuple(param.shape if param.is_contiguous() else param.T.shape)
        by_shape.setdefault(shape, []).append(i)
    places, stacks, total = [0] * len(lists), [], 0
    for (rows, cols), tensors in by_shape.items():
        stride = -(-rows * cols // ALIGNMENT) * ALIGNMENT
        if stride:
            stacks.append(Stack(total, stride, len(tensors), rows, cols))
        for i in tensors:
            places[i] = total
            total += stride
    return Plan(places, stacks, total)


def ratios(lists: TensorLists, adjust_lr_fn: str | None) -> list[float]:
    """What lr is multiplied by, for each matrix."""
    return [ratio(*param.shape, adjust_lr_fn) for param in lists.columns["param"]]


def ratio(rows: int, cols: int, adjust_lr_fn: str | None) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, cols))
    return math.sqrt(max(1.0, rows / max(cols, 1)))


def orthogonalize(
    directions: Tensor,
    stacks: list[Stack],
    coefficients: tuple[float, float, float],
    steps: int,
) -> Tensor:
    """All directions after Newton and Schulz's iteration, in memory of their own.

    The smaller Gram matrix is used, from the left or from the right: no transposed copy.
    """
    results = torch.empty_like(directions)
    for stack in stacks:
        given, wanted = stack.of(directions), stack.of(results)
        # On the CPU a few at a time: each product then finds the last one's result in the cache.
        size = stack.count if given.is_cuda else max(CPU_BATCH // stack.stride, 1)
        for x, y in zip(given.split(size), wanted.split(size), strict=True):
            y.copy_(_iterate(x, coefficients, steps))
    return results


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    if x.dim() == 3 and len(x) == 1 and x.is_cpu:  # there a batch of one takes up to a third longer
        return _iterate(x[0], coefficients, steps)[None]
    a, b, c = coefficients
    is_tall = x.shape[-2] > x.shape[-1]
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = x.mT @ x if is_tall else x @ x.mT
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        left, right = (x, polynomial) if is_tall else (polynomial, x)
        x = add_product(x, left, right, beta=a)
    return x
