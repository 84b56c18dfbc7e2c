"""Muon's step over all matrices, against torch.optim.Muon."""

import torch

from benchmarks.updates import UpdateBenchmark, with_masters
from slimkernels.optim import Muon


def torchs(params, **options):
    return torch.optim.Muon(params, **options).step


def ours(params, **options):
    return Muon(params, **options).step


def plain(params, **options):
    return Muon(params, backend="torch", **options).step


BENCHMARK = UpdateBenchmark(
    op="muon",
    shapes={
        "cpu": [
            ("50 matrices 16x16",),
            ("a small transformer's matrices",),
            ("bert-base matrices",),
        ],
        "cuda": [("50 matrices 16x16",), ("bert-base matrices",)],
    },
    eager=with_masters(torchs),
    ours=ours,
    truth=plain,  # torch's is bfloat16 whatever the parameters are
    # g, b twice; b, x written; w, x read and w written. The products are not counted.
    bytes=lambda s: 28 if s == 4 else 20 + 5 * s,
)
