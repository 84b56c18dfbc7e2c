"""Many tensors in one Triton launch: a table of addresses on the device, and its chunks.

The table is int64, a row a column of tensors, then a row of their sizes. A program finds in `owner`
which tensor its chunk belongs to, in `place` which of the tensor's chunks it is, and the address in
the table. Tables stay on the device until an address changes.
"""

from __future__ import annotations

from array import array
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkernels.backends._tensor_lists import TensorLists, flat
from slimkernels.backends.triton._common import unsupported_tensor

BLOCK = 1024  # 8 elements a lane of 4 warps: two 128-bit loads of float32 in flight a tensor
ALIGNMENT = 16  # bytes, of a 128-bit load

POINTED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def unsupported_lists(lists: TensorLists) -> str | None:
    return unsupported_tensor(lists.first) or lists.refusal


def table(lists: TensorLists, columns: tuple[str, ...], *rows: list[int]) -> Tensor:
    """(columns + rows + 1, tensors) int64 on the device; an absent column is zeros. `rows` follow
    from the sizes alone."""
    key = ("table", *columns)
    if key not in lists.kept:
        absent = [0] * len(lists)
        addresses = [lists.addresses.get(name, absent) for name in columns]
        numbers = array("q", flat([*addresses, *rows, lists.sizes]))
        lists.kept[key] = _on_device(numbers, lists, key)
    return _held(lists, lists.kept[key])


def chunks(lists: TensorLists, columns: tuple[str, ...]) -> list[tuple[bool, Tensor, int]]:
    """(whether 128-bit loads may be used, (2, chunks) owner and place, chunks) a launch.

    One launch where all tensors begin at a multiple of 16 bytes, as those of torch's allocator do;
    a second for tensors that are slices of another's memory and do not.
    """
    key = ("chunks", *columns)
    if key not in lists.kept:
        present = [lists.addresses[name] for name in columns if name in lists.addresses]
        is_aligned = [all(a % ALIGNMENT == 0 for a in row) for row in zip(*present, strict=True)]
        lists.kept[key] = []
        for wanted in sorted(set(is_aligned)):
            tensors = tuple(i for i, is_so in enumerate(is_aligned) if is_so == wanted)
            lists.kept[key].append((wanted, *_cut(lists, tensors)))
    return [(*rest, _held(lists, cut), n) for *rest, cut, n in lists.kept[key] if n]


def _cut(lists: TensorLists, tensors: tuple[int, ...]) -> tuple[Tensor, int]:
    """The chunks of some tensors."""
    if tensors not in lists.cut:
        owner, place = array("i"), array("i")
        for i in tensors:
            count = triton.cdiv(lists.sizes[i], BLOCK)
            owner.extend([i] * count)
            place.extend(range(count))
        lists.cut[tensors] = _on_device(owner + place, lists, ("cut", tensors)), len(owner)
    return lists.cut[tensors]


def starts(lists: TensorLists) -> tuple[Tensor, int]:
    """(tensors + 1,) int32: where each tensor's chunks begin among those of all; their number."""
    if "starts" not in lists.cut:
        numbers = array("i", accumulate((triton.cdiv(n, BLOCK) for n in lists.sizes), initial=0))
        lists.cut["starts"] = _on_device(numbers, lists, ("starts",)), numbers[-1]
    memory, total = lists.cut["starts"]
    return _held(lists, memory), total


def factors(lists: TensorLists, key: tuple, numbers: list[float]) -> Tensor:
    """(tensors,) float32 on the device: numbers that stay while `key` does."""
    if key not in lists.cut:
        lists.cut[key] = _on_device(array("f", numbers), lists, key)
    return _held(lists, lists.cut[key])


def _on_device(numbers: array, lists: TensorLists, key: tuple) -> Tensor:
    """The numbers where the tensors are, without waiting.

    A copy that a CUDA graph captures reads the host's memory at each replay, and no such memory
    can be allocated meanwhile: it takes that of the last copy, and keeps it.
    """
    dtype = {"q": torch.int64, "i": torch.int32, "f": torch.float32}[numbers.typecode]
    device = lists.first.device
    if not numbers or device.type != "cuda":
        host = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
        return host.to(device, copy=True)
    host = torch.frombuffer(numbers, dtype=dtype)
    last = lists.cut.pop(("pinned", key), None)
    if torch.cuda.is_current_stream_capturing() and last is not None:
        pinned = last.copy_(host)
    else:
        pinned = host.pin_memory()
        lists.cut["pinned", key] = pinned
    return _held(lists, pinned).to(device, non_blocking=True)


def _held(lists: TensorLists, memory: Tensor) -> Tensor:
    """`memory`; a graph that is being captured will read it long after this step."""
    if lists.first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        lists.captured.append(memory)
    return memory


def programs(lists: TensorLists, count: int) -> int:
    """Programs that stride over `count` chunks and add something up."""
    if lists.first.device.type != "cuda":
        return min(count, 3)
    properties = torch.cuda.get_device_properties(lists.first.device)
    return min(count, 8 * properties.multi_processor_count)


def rate(lr: float | Tensor) -> tuple[Tensor | None, float]:
    """A kernel's lr_ptr and lr: the device's own number, or one of the host."""
    if isinstance(lr, Tensor) and lr.device.type == "cuda":
        return lr, 0.0
    return None, float(lr)


@triton.jit
def read_rate(lr_ptr, lr):
    if lr_ptr is not None:
        lr = tl.load(lr_ptr)
    return lr


@triton.jit
def chunk_of(table_ptr, cut_ptr, size_row: tl.constexpr, count, number, BLOCK: tl.constexpr):
    """The tensor of which this program has a chunk, where that starts, and the tensor's size."""
    tensor = tl.load(cut_ptr + tl.program_id(0))
    place = tl.load(cut_ptr + number + tl.program_id(0))
    size = tl.load(table_ptr + size_row * count + tensor)
    return tensor, place.to(tl.int64) * BLOCK, size


@triton.jit
def pointer(
    table_ptr, row: tl.constexpr, count, tensor, TYPE: tl.constexpr, IS_ALIGNED: tl.constexpr
):
    """The address of a tensor in a row of the table."""
    address = tl.load(table_ptr + row * count + tensor).to(tl.pointer_type(TYPE))
    if IS_ALIGNED:
        address = tl.multiple_of(address, 16)  # without it no load is of 128 bits
    return address


@triton.jit
def elements(start, BLOCK: tl.constexpr):
    """Where a chunk's elements are. A lane takes four at a time, 128 bits of float32; of its own
    choice it would take eight of bfloat16, and exchange registers with other lanes at each store.
    """
    return start + tl.max_contiguous(tl.arange(0, BLOCK), 4)


def narrow(load: int, store: int = 0) -> dict:
    """For COMPILES: the instructions that take less than 128 bits of a chunk."""
    why = "a chunk's masked end and tensors at odd addresses go by elements, bfloat16 by four"
    return dict(load=load, store=store, why=why)


@triton.jit
def sum_of_chunks(sums_ptr, starts_ptr, tensor, BLOCK: tl.constexpr):
    """The sum over a tensor's chunks, in float64 and always in the same order."""
    end = tl.load(starts_ptr + tensor + 1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(tl.load(starts_ptr + tensor), end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + at, mask=at < end, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def clipped(clip_ptr, size, IS_MAXIMIZED: tl.constexpr):
    """What gradients are multiplied by; and the size, 0 where the step is not to be taken."""
    coefficient = 1.0
    if clip_ptr is not None:
        coefficient = tl.load(clip_ptr + 1)
        size = tl.where(tl.load(clip_ptr + 2) != 0.0, size, 0)
    if IS_MAXIMIZED:
        coefficient = -coefficient
    return coefficient, size


@triton.jit
def read_master(param, master, mask, HAS_MASTER: tl.constexpr):
    """The value to update: the master of a parameter in fewer bits, unless somebody has written
    the parameter since, or the parameter itself where it has no master."""
    narrow = tl.load(param, mask=mask)
    value = narrow.to(tl.float32)
    if HAS_MASTER:
        wide = tl.load(master, mask=mask)
        is_copy = wide.to(narrow.dtype).to(tl.float32) == value
        value = tl.where(is_copy, wide, value)
    return value


@triton.jit
def write_master(param, master, value, mask, HAS_MASTER: tl.constexpr):
    tl.store(param, value.to(param.dtype.element_ty), mask=mask)
    if HAS_MASTER:
        tl.store(master, value, mask=mask)
