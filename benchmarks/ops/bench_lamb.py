"""LAMB's step over all parameters, against its definition in plain PyTorch."""

from benchmarks.updates import UpdateBenchmark
from slimkernels.optim import LAMB


def ours(params, **options):
    return LAMB(params, **options).step


def plain(params, **options):
    return LAMB(params, backend="torch", **options).step


BENCHMARK = UpdateBenchmark(
    op="lamb",
    shapes={
        "cpu": [("50 tensors of 64",), ("a small transformer",), ("bert-base",)],
        "cuda": [("50 tensors of 64",), ("bert-base",)],
    },
    eager=plain,
    ours=ours,
    truth=plain,
    # w, g, m, v read and m, v written; w, m, v read and w written.
    bytes=lambda s: 40 if s == 4 else 32 + 5 * s,
)
