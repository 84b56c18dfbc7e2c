"""How a drawn call of attention is judged: output, lse and every gradient, by the definition.

The rule is assert_no_worse's: at most twice the error of eager PyTorch (the definition computed in
the inputs' dtype), plus a floor for where eager is exact: one unit in the last place of the largest
value. Here that value is what it would be if nothing cancelled, since eager's cancel better than
those of any kernel that does not store the scores:

- Backward subtracts delta, a row's sum of dy * output, from dy @ value^T. Where a query sees one
  key the two are equal. Eager sums the same numbers twice and says 0; a kernel has the output
  as it was rounded to its dtype, so that the last place of delta is left.
- Probabilities are exp(score - lse): the last place of either in float32 is their relative error.
- An output of few elements may be a sum of large terms whose rounded value eager hits by luck.

lse is float32 whatever the dtype, and what sums over many scores (the gradients of bias, sinks and
table) eager sums in the scores' dtype, badly in 16 bits. Their eager computes in float32 from the
same inputs: stricter than the rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_cases import NAME
from attention_drawn import Case, arguments, build
from torch import Tensor

from slimkernels.dispatch import OPS
from slimkernels.ops._attention_reference import scaled_dot_product_attention_reference
from slimkernels.ops._dropout import draw_seed
from slimkernels.testing import assert_no_worse

COMPUTED_IN_FLOAT32 = ("lse", *(f"gradient of {name}" for name in ("bias", "sinks", "table")))

Function = Callable[[Case, dict[str, Tensor], dict], tuple[Tensor, Tensor]]


def canonical(case: Case, leaves: dict[str, Tensor], options: dict):
    """query, key, value and the Call, with the seed that the op draws, too."""
    inputs, options = arguments(case, leaves, options)
    *inputs, call = OPS[NAME].arguments(*inputs, **options)
    if call.dropout_p:
        torch.manual_seed(case.seed)
        call = call._replace(seed=draw_seed(inputs[0].device))
    return inputs, call


def definition(dtype: torch.dtype | None = None) -> Function:
    def attend(case, leaves, options):
        inputs, call = canonical(case, leaves, options)
        return scaled_dot_product_attention_reference(*inputs, call, dtype=dtype)

    return attend


def assert_matches_definition(function: Function, case: Case, device: torch.device) -> None:
    """Output, lse and all gradients of `function` are as good as the rule above asks.

    Errors  AssertionError; also where an input was written to
    """
    leaves, options = build(case, device)
    before = {name: t.clone() for name, t in leaves.items()}
    actual = run(function, case, leaves, options)
    for name, t in leaves.items():
        assert torch.equal(t, before[name]), f"{name} was written to"
    wide = {name: t.double() for name, t in leaves.items()}
    truth = run(definition(), case, wide, options)
    eager = run(definition(getattr(torch, case.dtype)), case, leaves, options)
    if case.dtype != "float32":
        single = run(definition(), case, leaves, options)
        eager |= {name: t for name, t in single.items() if name in COMPUTED_IN_FLOAT32}
    assert torch.equal(actual["lse"] == -torch.inf, truth["lse"] == -torch.inf), "lse's -inf"
    floors = floors_of(case, wide, options)
    for name, expected in truth.items():
        assert_no_worse(actual[name], eager[name], expected, floor=floors[name], what=name)


def run(function: Function, case: Case, leaves: dict[str, Tensor], options: dict):
    """Output, lse, and the gradient of each leaf under its name, for the case's random dy, dlse."""
    leaves = {name: t.detach() for name, t in leaves.items()}
    trained = {name: t.requires_grad_() for name, t in leaves.items() if name not in case.frozen}
    outputs = function(case, leaves, options)
    results = {"output": outputs[0].detach(), "lse": outputs[1].detach()}
    flowing = slice(case.lse == "alone", 1 + (case.lse in ("differentiated", "alone")))
    # lse does not depend on the value.
    if not any(y.requires_grad for y in outputs[flowing]):
        assert not trained or (case.lse == "alone" and trained.keys() == {"value"})
        return results
    dys = [dy.to(y.dtype) for y, dy in zip(outputs, gradients(case, outputs), strict=True)]
    found = torch.autograd.grad(
        outputs[flowing], list(trained.values()), dys[flowing], allow_unused=True
    )
    for (name, leaf), gradient in zip(trained.items(), found, strict=True):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        assert gradient.dtype == leaf.dtype, f"gradient of {name} is {gradient.dtype}"
        results[f"gradient of {name}"] = gradient
    return results


def gradients(case: Case, outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What flows into backward, in bfloat16's precision, so that every dtype sees the same."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    return [torch.randn(y.shape, generator=generator).bfloat16().to(y.device) for y in outputs]


@torch.no_grad()
def floors_of(case: Case, leaves: dict[str, Tensor], options: dict) -> dict[str, float]:
    """One unit in the last place of each result, were all terms of its sums of one sign."""
    inputs, call = canonical(case, leaves, options)
    q, k, v = inputs
    p, lse = probabilities(case, *inputs, call)  # (B, H, Tq, Tk), of ragged ones (1, H, Tq, Tk)
    y = q[..., :1].expand(*q.shape[:-1], v.shape[-1])
    dy, dlse = (dy.double() for dy in gradients(case, (y, lse)))
    if case.ragged:
        q, k, v, dy = (t.transpose(0, 1)[None] for t in (q, k, v, dy))
    k, v = (t.repeat_interleave(case.heads[1], dim=1) for t in (k, v))
    dlse = dlse.view(*p.shape[:-1], 1) if case.lse in ("differentiated", "alone") else 0.0 * p
    dy = dy if case.lse != "alone" else 0.0 * dy
    q, k, v, dy, dlse = (t.abs() for t in (q, k, v, dy, dlse))
    scale, keep = abs(call.scale), 1 - case.dropout_p
    dscores = p * (dy @ v.mT) / keep
    delta = dscores.sum(-1, keepdim=True) + dlse
    dscores = dscores + p * delta
    # A score's own terms, and what is added to it.
    terms = largest(scale * (q @ k.mT) * (p > 0))
    terms += sum(largest(t) for t in (call.bias, call.table, call.sinks) if t is not None)
    results = {
        "output": p @ v / keep,
        "gradient of query": scale * (dscores @ k),
        "gradient of key": scale * (dscores.mT @ q),
        "gradient of value": p.mT @ dy / keep,
        "gradient of sinks": delta.sum((0, 2)),
        "gradient of table": dscores.sum((0, 2, 3)),  # of all buckets: few of them sum less
    }
    if call.bias is not None:
        shared = [dim for dim, size in enumerate(call.bias.shape) if size == 1]
        if case.ragged:
            dscores = by_sequence(case, dscores)
        results["gradient of bias"] = dscores.sum(shared, keepdim=True) if shared else dscores
    single = torch.finfo(torch.float32).eps
    best = lse.view(p.shape[:-1]) + p.sum(-1).log()  # about a row's largest score
    ulp = max(
        torch.finfo(getattr(torch, case.dtype)).eps, single * max(largest(lse), largest(best))
    )
    floors = {name: ulp * largest(t) for name, t in results.items()}
    return {**floors, "lse": single * (largest(lse) + terms)}


def probabilities(case: Case, q: Tensor, k: Tensor, v: Tensor, call) -> tuple[Tensor, Tensor]:
    """The softmax, read from an output whose values are the unit vectors; and lse."""
    Tk = k.shape[0] if case.ragged else k.shape[2]
    units = torch.eye(Tk, dtype=v.dtype, device=v.device)
    units = units[:, None] if case.ragged else units
    units = units.expand(*v.shape[:-1], Tk)
    call = call._replace(seed=None, dropout_p=0.0)
    p, lse = scaled_dot_product_attention_reference(q, k, units, call)
    return (p.transpose(0, 1)[None] if case.ragged else p), lse


def by_sequence(case: Case, x: Tensor) -> Tensor:
    """(1, H, Tq, Tk) of ragged sequences as (B, H, longest, longest), zero past their ends."""
    longest = [max((n[side] for n in case.lengths), default=0) for side in (0, 1)]
    result = x.new_zeros(len(case.lengths), x.shape[1], *longest)
    i = j = 0
    for b, (n, m) in enumerate(case.lengths):
        result[b, :, :n, :m] = x[0, :, i : i + n, j : j + m]
        i, j = i + n, j + m
    return result


def largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 of no elements."""
    x = x.detach().abs()
    x = x[x.isfinite()]
    return x.max().item() if x.numel() else 0.0
