"""AdamW's step over all parameters, without and with clipping, against torch.optim.AdamW."""

import torch

from benchmarks.updates import UpdateBenchmark, with_masters
from slimkernels.optim import AdamW


def torchs(params, max_grad_norm=None, **options):
    optimizer = torch.optim.AdamW(params, **options)
    if max_grad_norm is None:
        return optimizer.step

    def clip_and_step():
        grads = [param.grad for param in params]
        kept = [grad.clone() for grad in grads] if params[0].dtype == torch.float64 else None
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
        optimizer.step()
        if kept:  # the truth's gradients must not shrink from step to step
            torch._foreach_copy_(grads, kept)

    return clip_and_step


def ours(params, **options):
    return AdamW(params, **options).step


BENCHMARK = UpdateBenchmark(
    op="adamw",
    shapes={
        "cpu": [("50 tensors of 64",), ("a small transformer",), ("bert-base",)],
        "cuda": [("50 tensors of 64",), ("bert-base",)],
    },
    eager=with_masters(lambda params, **v: torchs(params, foreach=True, **v)),
    ours=ours,
    truth=torchs,
    rivals={"torch_fused": with_masters(lambda params, **v: torchs(params, fused=True, **v))},
    variants=({}, {"max_grad_norm": 1.0}),
    # w, m, v read and written, g read; of bfloat16 the master and the copy too. A norm reads g.
    bytes=lambda s, max_grad_norm=None: (
        (28 if s == 4 else 24 + 3 * s) + (0 if max_grad_norm is None else s)
    ),
)
