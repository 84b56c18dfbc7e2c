"""How a drawn call of attention is judged: output, lse and every gradient, by the definition.

The rule is assert_no_worse's: at most twice the error of eager PyTorch (the definition computed in
the inputs' dtype), plus a floor for where eager is exact: one unit in the last place of the largest
value. Here that value is what it would be if nothing cancelled (the root of the sum of its terms'
squares), since eager's terms cancel better than those of any kernel that stores no scores:

- Backward subtracts delta, a row's sum of dy * output, from dy @ value^T. Where a query sees one
  key the two are equal. Eager sums the same numbers twice and says 0; a kernel has the output
  as it was rounded to its dtype, so that the last place of delta is left.
- Probabilities are exp(score - lse): the last place of either in float32 is their relative error.
- An output of few elements may be a sum of large terms whose rounded value eager hits by luck.

lse is float32 whatever the dtype, and what sums over many scores (the gradients of bias, sinks and
table) eager sums in the scores' dtype, badly in 16 bits. Their eager computes in float32 from the
same inputs: stricter than the rule. An independent FlashAttention-2 in PyTorch passed 2500 draws.
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
    floors = floors_of(case, wide, options, truth)
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
def floors_of(
    case: Case, leaves: dict[str, Tensor], options: dict, truth: dict[str, Tensor]
) -> dict[str, float]:
    """One unit in the last place of each result, were nothing cancelled: of the root of the sum of
    the squares of its terms, as large as roundings of both signs make it."""
    (q, k, v), call = canonical(case, leaves, options)
    p, lse = probabilities(case, q, k, v, call)  # (B, H, Tq, Tk), of ragged ones (1, H, Tq, Tk)
    y = truth["output"]
    dy, dlse = (dy.double() for dy in gradients(case, (y, lse)))
    if case.ragged:
        q, k, v, y, dy = (t.transpose(0, 1)[None] for t in (q, k, v, y, dy))
    k, v = (t.repeat_interleave(case.heads[1], dim=1) for t in (k, v))
    dlse = dlse.view(*p.shape[:-1], 1) * (case.lse in ("differentiated", "alone"))
    dy = dy * (case.lse != "alone")
    keep, scale = 1 - case.dropout_p, call.scale
    # From here on, of squares. A row's delta has one error, which all its scores share.
    p2, q2, k2, v2, dy2 = (t.square() for t in (p, q, k, v, dy))
    y2 = p2 @ v2 / keep**2 + y.square()
    delta2 = (dy2 * y2).sum(-1, keepdim=True) + dlse.square()
    dscores2 = p2 * (dy2 @ v2.mT / keep**2 + delta2)
    everything = p.sum(-1, keepdim=True)
    rows2 = delta2 * everything.square()
    sinks2 = (1 - everything).square() * (delta2 + (dy * y).sum(-1, keepdim=True).square())
    results = {
        "output": y2,
        "gradient of query": scale**2 * (dscores2 @ k2 + delta2 * (p @ k).square()),
        "gradient of key": scale**2 * (dscores2.mT @ q2),
        "gradient of value": p2.mT @ dy2 / keep**2,
        "gradient of sinks": sinks2.sum((0, 2)),
        # As if all keys were in one bucket.
        "gradient of table": dscores2.sum((0, 2, 3)) + rows2.sum((0, 2, 3)),
    }
    if call.bias is not None:
        shared = [dim for dim, size in enumerate(call.bias.shape) if size == 1]
        if case.ragged:
            dscores2, rows2 = (by_sequence(case, t) for t in (dscores2, rows2))
        if 3 in shared:
            dscores2 = dscores2.sum(-1, keepdim=True) + rows2
        others = [dim for dim in shared if dim != 3]
        results["gradient of bias"] = dscores2.sum(others) if others else dscores2
    single = torch.finfo(torch.float32).eps
    # A row's largest score, nearly, and lse: probabilities are exp of their difference.
    exponent = max(largest(lse), largest(lse.view(p.shape[:-1]) + p.sum(-1).log()))
    ulp = max(torch.finfo(getattr(torch, case.dtype)).eps, single * exponent)
    # The last place of smaller numbers is below the normal range, which may be flushed to zero.
    tiny = torch.finfo(torch.float32).tiny / single
    floors = {name: ulp * largest(t) ** 0.5 + tiny for name, t in results.items()}
    # A score's own terms, and what is added to it.
    terms = abs(scale) * largest((q.abs() @ k.abs().mT) * (p > 0))
    terms += sum(largest(t) for t in (call.bias, call.table, call.sinks) if t is not None)
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
    """(1, H, Tq, Tk or 1) of ragged sequences as (B, H, longest, longest or 1), zero past ends."""
    longest = [max((n[side] for n in case.lengths), default=0) for side in (0, 1)]
    one = x.shape[-1] == 1
    result = x.new_zeros(len(case.lengths), x.shape[1], longest[0], 1 if one else longest[1])
    i = j = 0
    for b, (n, m) in enumerate(case.lengths):
        part = x[0, :, i : i + n]
        result[b, :, :n, : 1 if one else m] = part if one else part[..., j : j + m]
        i, j = i + n, j + m
    return result


def largest(x: Tensor) -> float:
    """The largest finite magnitude; 0 of no elements."""
    x = x.detach().abs()
    x = x[x.isfinite()]
    return x.max().item() if x.numel() else 0.0
