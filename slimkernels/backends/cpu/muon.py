"""Muon on the CPU: csrc/cpu/muon.cpp, and torch's products."""

from array import array

import torch

from slimkernels.backends._muon import orthogonalize, plan, ratios
from slimkernels.backends.cpu._common import DTYPES, _cpu, pointer, run
from slimkernels.backends.cpu._tensor_lists import number, table, unsupported_lists

# Mirrors enum Row in csrc/cpu/muon.cpp; then each direction's place.
COLUMNS = ("param", "grad", "momentum_buffer", "master")

# Where a processor has no products in bfloat16, torch's are slower than those in float32.
_HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def unsupported(
    lists,
    clip,
    lr,
    weight_decay,
    momentum,
    nesterov,
    ns_coefficients,
    eps,
    ns_steps,
    adjust_lr_fn,
):
    return unsupported_lists(lists)


def update(
    lists,
    clip,
    lr,
    weight_decay,
    momentum,
    nesterov,
    ns_coefficients,
    eps,
    ns_steps,
    adjust_lr_fn,
):
    if clip is not None and not clip[2]:
        return
    where = plan(lists)
    kind = torch.bfloat16 if _HAS_BFLOAT16 else torch.float32
    directions = torch.empty(where.total, dtype=kind)
    rows, count, kinds = table(lists, COLUMNS, where.places), len(lists), (lists.first.dtype, kind)
    kinds = [DTYPES[dtype] for dtype in kinds]
    run(
        *(_cpu.muon_direction, rows, count, pointer(clip), pointer(directions)),
        *(momentum, int(nesterov), eps, *kinds),
    )
    directions = orthogonalize(directions, where.stacks, ns_coefficients, ns_steps)
    factors = array("d", ratios(lists, adjust_lr_fn))
    run(
        *(_cpu.muon_apply, rows, count, pointer(directions), factors.buffer_info()[0]),
        *(number(lr), weight_decay, *kinds),
    )
