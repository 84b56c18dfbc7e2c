"""What the layers' parts are run by: fused with their neighbours where they are what they seem."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkernels.nn.dropout import Dropout
from slimkernels.nn.gelu import GELU
from slimkernels.nn.layer_norm import LayerNorm
from slimkernels.ops.add_layer_norm import add_layer_norm, post_norm
from slimkernels.ops.gelu import gelu, gelu_of_product
from slimkernels.ops.linear import linear


def is_plain(module: torch.nn.Module, *classes: type) -> bool:
    """Whether a call of `module` does what one of `classes` does, and nothing else sees it.

    A subclass may do something else: adapters are often subclasses, parametrized modules always.
    """
    if type(module) not in classes or "forward" in vars(module):
        return False
    forward = module._forward_pre_hooks or module._forward_hooks
    return not (forward or module._backward_pre_hooks or module._backward_hooks)


def is_plain_linear(layer: torch.nn.Module) -> bool:
    """Likewise of nn.Linear, whose weight may be quantised or sharded: a tensor of its own type."""
    return is_plain(layer, torch.nn.Linear) and type(layer.weight) in (torch.nn.Parameter, Tensor)


def product(layer: torch.nn.Module, x: Tensor) -> Tensor:
    if is_plain_linear(layer):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


def gelu_form(activation: Callable) -> str | None:
    """Which of gelu's approximations `activation` is; None if it is something else."""
    if activation is F.gelu:
        return "none"
    if isinstance(activation, torch.nn.Module) and is_plain(activation, torch.nn.GELU, GELU):
        return activation.approximate
    return None


def activated_product(layer: torch.nn.Module, activation: Callable, x: Tensor) -> Tensor:
    """activation(layer(x)), the bias added inside gelu's pass."""
    approximate = gelu_form(activation)
    if approximate is None:
        return activation(product(layer, x))
    if is_plain_linear(layer):
        return gelu_of_product(x, layer.weight, layer.bias, approximate)
    return gelu(layer(x), approximate=approximate)


def add_norm(
    branch: Tensor, residual: Tensor, norm: torch.nn.Module, dropout: torch.nn.Module
) -> tuple[Tensor, Tensor]:
    """(norm(total), total) with total = residual + dropout(branch)."""
    if _is_one_pass(norm, dropout):
        return _in_one_pass(add_layer_norm, branch, residual, norm, dropout)
    total = residual + dropout(branch)
    return norm(total), total


def norm_of_sum(
    branch: Tensor, residual: Tensor, norm: torch.nn.Module, dropout: torch.nn.Module
) -> Tensor:
    """norm(residual + dropout(branch)), where nobody goes on with the sum."""
    if _is_one_pass(norm, dropout):
        return _in_one_pass(post_norm, branch, residual, norm, dropout)
    return norm(residual + dropout(branch))


def _is_one_pass(norm, dropout):
    fused = is_plain(norm, LayerNorm, torch.nn.LayerNorm)
    return fused and is_plain(dropout, Dropout, torch.nn.Dropout)


def _in_one_pass(op, branch, residual, norm, dropout):
    p = dropout.p if dropout.training else 0.0
    # Under autocast products come in its dtype; as in torch, the sum is in residual's.
    args = branch.to(residual.dtype), residual, norm.normalized_shape, norm.weight, norm.bias
    return op(*args, norm.eps, dropout_p=p)
