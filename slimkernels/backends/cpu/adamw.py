"""AdamW on the CPU: csrc/cpu/adamw.cpp."""

from slimkernels.backends.cpu._common import DTYPES, _cpu, pointer, run
from slimkernels.backends.cpu._tensor_lists import ADAM_COLUMNS, number, table, unsupported_lists


def unsupported(lists, clip, lr, betas, eps, weight_decay, maximize):
    return unsupported_lists(lists)


def update(lists, clip, lr, betas, eps, weight_decay, maximize):
    run(
        *(_cpu.adamw, table(lists, ADAM_COLUMNS), len(lists), pointer(clip)),
        *(number(lr), *betas, eps, weight_decay),
        *(int("max_exp_avg_sq" in lists.columns), int(maximize), DTYPES[lists.first.dtype]),
    )
