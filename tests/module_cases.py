"""What the tests of modules and models share: outputs and gradients, measured against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimkernels.testing import assert_no_worse


def outputs_and_gradients(
    module: nn.Module, call: Callable, inputs: tuple = (), seed: int = 0
) -> dict[str, Tensor]:
    """Outputs of ``call(module, *inputs)`` by place, and gradients of inputs and parameters.

    inputs  floating tensors; what flows into backward is drawn from `seed`, alike in every dtype
    """
    module.zero_grad()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = call(module, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = tuple(y for y in outputs if y is not None)
    generator = torch.Generator().manual_seed(seed)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    torch.autograd.backward(outputs, dys)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results |= {f"gradient of input {i}": x.grad for i, x in enumerate(leaves)}
    return results | {
        f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None
    }


def assert_model_no_worse(
    actual: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """The twice-eager rule for a whole model at once.

    Each result is divided by its largest true value, and the rule is put to all of them as one
    vector: eager's error in a single loss, or in a bias of two numbers, can by luck be nothing.
    What is nothing in truth, as the gradient of a bias that a softmax does not see, has no such
    value, only rounding, in units of which no other error would be seen: that is a vector apart.
    """
    assert actual.keys() == eager.keys() == truth.keys()
    sizes = {name: t.double().abs().max() for name, t in truth.items()}
    smallest = 1e-9 * max(sizes.values())
    nothing = {name: 1.0 for name, size in sizes.items() if size <= smallest}
    rest = {name: size for name, size in sizes.items() if name not in nothing}

    def assert_right(sizes, **options):
        vectors = []
        for results in (actual, eager, truth):
            scaled = [(results[name].double() / size).flatten() for name, size in sizes.items()]
            vectors.append(torch.cat(scaled).to(next(iter(results.values())).dtype))
        assert_no_worse(*vectors, **options)

    assert_right(rest, what="the model")
    if nothing:
        assert_right(nothing, factor=8.0, what="rounding")
