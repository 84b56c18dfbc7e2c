"""What one call costs the host: python -m benchmarks.host_time

Tensors so small that Python, checks and the choice of a backend take as long as the numbers do.
Microseconds a call, of the op as it runs by itself and of torch's own functions, which take turns
of a few calls each: medians; the ratio is that of the turns, above 1 where ours is faster. "With
backward" is forward and the gradient of every floating input.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import slimkernels as sk
from benchmarks.report import markdown
from benchmarks.timing import Budget, interleave, quantiles, speedup

CALLS = 10  # a turn: shorter than a slice of the scheduler's, which other programs may take
HEAD = ["call", "us", "eager's us", "ratio", "with backward", "eager's", "ratio"]


def cases(device: str) -> dict[str, tuple[Callable, Callable, tuple[Tensor, ...]]]:
    """Label -> the op, torch's own functions, and the tensors that both take."""
    torch.manual_seed(0)
    x, residual, matrix = torch.randn(3, 64, 64, device=device).unbind()
    weight, bias = torch.randn(2, 64, device=device).unbind()
    target = torch.randint(64, (64,), device=device)
    query = torch.randn(1, 8, 1, 64, device=device)
    key, value = torch.randn(2, 1, 8, 128, 64, device=device).unbind()
    lengths = torch.tensor([100], dtype=torch.int32, device=device)
    seen = torch.arange(128, device=device) < lengths.view(1, 1, 1, 1)
    ours, eager = sk.scaled_dot_product_attention, F.scaled_dot_product_attention
    return {
        "softmax": (sk.softmax, lambda x: F.softmax(x, -1), (x,)),
        "softmax, causal": (
            lambda x: sk.softmax(x, is_causal=True),
            lambda x: F.softmax(x.masked_fill(~torch.ones_like(x, dtype=bool).tril(), -1e9), -1),
            (x,),
        ),
        "layer_norm": (
            lambda x, *parameters: sk.layer_norm(x, 64, *parameters),
            lambda x, *parameters: F.layer_norm(x, (64,), *parameters),
            (x, weight, bias),
        ),
        "add_layer_norm": (
            lambda x, residual, *parameters: sk.add_layer_norm(x, residual, 64, *parameters)[0],
            lambda x, residual, *parameters: F.layer_norm(residual + x, (64,), *parameters),
            (x, residual, weight, bias),
        ),
        "gelu": (sk.gelu, F.gelu, (x,)),
        "gelu, bias": (lambda x, b: sk.gelu(x, bias=b), lambda x, b: F.gelu(x + b), (x, bias)),
        "cross_entropy": (
            lambda x: sk.cross_entropy(x, target),
            lambda x: F.cross_entropy(x, target),
            (x,),
        ),
        "linear": (sk.linear, F.linear, (x, matrix, bias)),
        "attention, one query": (ours, eager, (query, key, value)),
        "attention, key_lengths": (
            lambda *qkv: ours(*qkv, key_lengths=lengths),
            lambda *qkv: eager(*qkv, attn_mask=seen),
            (query, key, value),
        ),
        "attention, one key": (ours, eager, (query, key[:, :, :1], value[:, :, :1])),
    }


def provider(function: Callable, tensors: tuple[Tensor, ...], backward: bool) -> Callable:
    """CALLS calls of `function`, with their gradients if `backward`, for interleave()."""
    tensors = tuple(t.detach().requires_grad_(backward) for t in tensors)
    dy = torch.randn_like(function(*tensors))
    device = tensors[0].device

    def run() -> dict[str, tuple[float, float]]:
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for _ in range(CALLS):
            y = function(*tensors)
            if backward:
                torch.autograd.grad(y, tensors, dy)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
        if device.type == "cuda":
            torch.cuda.synchronize()  # the device's queue must not fill
        return {"": (1e6 * wall / CALLS, 1e6 * cpu / CALLS)}

    return run


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="the cases whose name has this in it")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each number's pair")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for label, (ours, eager, tensors) in cases(options.device).items():
        if options.only not in label:
            continue
        row = [label]
        for backward in (False, True):
            providers = {
                "ours": provider(ours, tensors, backward),
                "eager": provider(eager, tensors, backward),
            }
            budget = Budget(seconds=options.seconds, least=20, most=10**5, warm_up=5)
            samples = interleave(providers, budget)
            wall = {name: parts[""].wall for name, parts in samples.items()}
            row += [f"{quantiles(wall[name])[0]:.1f}" for name in providers]
            row.append(f"{speedup(wall['eager'], wall['ours']):.2f}")
        rows.append(row)
    print("\n".join(markdown(HEAD, rows)))


if __name__ == "__main__":
    main()
