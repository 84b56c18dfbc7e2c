"""What tests of add_layer_norm and add_rms_norm share: inputs, eager PyTorch, the definition."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from op_cases import maybe_compiled, skip_unsupported, with_seed
from torch import Tensor

import slimkernels as sk
from slimkernels.ops._dropout import draw_seed, keep_mask
from slimkernels.ops.add_layer_norm import add_layer_norm_reference
from slimkernels.ops.add_rms_norm import add_rms_norm_reference
from slimkernels.testing import assert_op_matches

EPS = 1e-5
REFERENCES = {"add_layer_norm": add_layer_norm_reference, "add_rms_norm": add_rms_norm_reference}


def inputs_of(op, shape, dtype, device, residual_dtype=None, parameter_dtype=None):
    """x, residual, and the parameters that the op has."""
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape, device=device).unbind()
    weight, bias = torch.randn(2, shape[-1], device=device).to(parameter_dtype or dtype).unbind()
    parameters = (weight, bias) if op == "add_layer_norm" else (weight,)
    return x.to(dtype), residual.to(residual_dtype or dtype), *parameters


def mask_of(x: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Of dropout: rows are counted through all dimensions but the last."""
    N = x.shape[-1]
    rows = torch.arange(x.numel() // max(N, 1), device=x.device)[:, None]
    return keep_mask(seed, rows, torch.arange(N, device=x.device), dropout_p).view(x.shape)


def functions_of(
    op, backend, *, dropout_p=0.0, row_scale=None, zero_centered=False, compiled=False
):
    """The op, eager PyTorch in the inputs' dtypes, and the definition, from the same seed."""
    options = dict(dropout_p=dropout_p, row_scale=row_scale, zero_centered=zero_centered)

    def ours(x, residual, *parameters):
        parameters = (*parameters, *([None] * (1 + (op == "add_layer_norm") - len(parameters))))
        return getattr(sk, op)(
            *(x, residual, x.shape[-1:], *parameters, EPS), **options, backend=backend
        )

    def eager(x, residual, *parameters):
        if dropout_p:
            x = x * mask_of(x, draw_seed(x.device), dropout_p) * (1 / (1 - dropout_p))
        if row_scale is not None:
            x = (x * row_scale[..., None]).to(x.dtype)
        total = residual + x
        # A GPU's norms take one dtype for everything.
        wide = functools.reduce(torch.promote_types, (t.dtype for t in (total, *parameters)))
        wide = torch.promote_types(wide, torch.float32) if zero_centered else wide
        parameters = [p.to(wide) for p in parameters]
        if zero_centered and parameters:
            parameters[0] = parameters[0] + 1
        norm = F.layer_norm if op == "add_layer_norm" else F.rms_norm
        parameters += [None] * (1 + (op == "add_layer_norm") - len(parameters))
        return norm(total.to(wide), x.shape[-1:], *parameters, EPS).to(x.dtype), total

    def reference(x, residual, *parameters):
        seed = draw_seed(x.device) if dropout_p else None
        flat = None if row_scale is None else row_scale.expand(x.shape[:-1]).reshape(-1)
        parameters = (*parameters, *([None] * (1 + (op == "add_layer_norm") - len(parameters))))
        return REFERENCES[op](x, residual, *parameters, EPS, dropout_p, flat, zero_centered, seed)

    return with_seed(maybe_compiled(ours, compiled)), with_seed(eager), with_seed(reference)


def check(op, backend, inputs, compiled=False, **options):
    x, residual, *parameters = inputs
    skip_unsupported(op, backend, x, residual, x.shape[-1:], *parameters, **options)
    assert_op_matches(*functions_of(op, backend, compiled=compiled, **options), inputs)
