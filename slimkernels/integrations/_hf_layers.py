"""Layers of transformers on the library's kernels, each over the modules that it has.

What is small in evaluation is left to transformers' own code: Python would take the longer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import activations

from slimkernels import nn
from slimkernels.nn._parts import is_plain, is_plain_linear, norm_of_sum, product
from slimkernels.nn._torchs_own import is_small, is_torchs
from slimkernels.ops.geglu import geglu
from slimkernels.ops.gelu import gelu, gelu_of_product
from slimkernels.ops.relu_squared import relu_squared
from slimkernels.ops.rms_norm import rms_norm
from slimkernels.ops.silu import silu
from slimkernels.ops.swiglu import swiglu


def is_theirs(x: Tensor) -> bool:
    """Whether transformers' own code computes from x: it is small, or of a kind no kernel takes."""
    return is_small(x) or is_torchs(x)


class GELUActivation(activations.GELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_theirs(input) else gelu(input)


class NewGELUActivation(activations.NewGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_theirs(input) else gelu(input, approximate="tanh")


class FastGELUActivation(activations.FastGELUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_theirs(input) else gelu(input, approximate="tanh")


class GELUTanh(activations.GELUTanh):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_theirs(input) else gelu(input, approximate="tanh")


class SiLUActivation(activations.SiLUActivation):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_theirs(input) else silu(input)


class ReLUSquaredActivation(activations.ReLUSquaredActivation):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_theirs(input) else relu_squared(input)


_GELU = (activations.GELUActivation, GELUActivation)
_GELU_TANH = (
    *(activations.NewGELUActivation, NewGELUActivation),
    *(activations.FastGELUActivation, FastGELUActivation),
    *(activations.GELUTanh, GELUTanh),
)
_SILU = (activations.SiLUActivation, SiLUActivation, torch.nn.SiLU, nn.SiLU)


def _gelu_form(activation) -> str | None:
    """Which of gelu's approximations `activation` is; None if it is something else."""
    if not isinstance(activation, torch.nn.Module):
        return "none" if activation in (F.gelu, activations.gelu) else None
    if is_plain(activation, *_GELU):
        return "none"
    if is_plain(activation, *_GELU_TANH):
        return "tanh"
    return activation.approximate if is_plain(activation, torch.nn.GELU, nn.GELU) else None


def _gated(activation, gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up."""
    form = _gelu_form(activation)
    if form is not None:
        return geglu(up, gate=gate, approximate=form)
    return swiglu(up, gate=gate) if is_plain(activation, *_SILU) else activation(gate) * up


def activated(layer: torch.nn.Module, activation, x: Tensor) -> Tensor:
    """activation(layer(x)), the bias added inside gelu's pass."""
    form = _gelu_form(activation)
    if form is None or not is_plain_linear(layer):
        return activation(product(layer, x))
    return gelu_of_product(x, layer.weight, layer.bias, form)


class RMSNorm:
    """LlamaRMSNorm: the output has the wider of the dtypes of input and weight."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if is_torchs(hidden_states) or self.weight.dtype not in (wide, torch.float32):
            return super().forward(hidden_states)
        x = hidden_states.to(wide)
        return rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


class T5RMSNorm:
    """T5LayerNorm: as LlamaRMSNorm, but a narrow weight makes a narrow output."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        if is_torchs(x) or weight.dtype not in (x.dtype, torch.float32):
            return super().forward(x)
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        return rms_norm(x, weight.shape, weight, self.variance_epsilon)


class ZeroCenteredRMSNorm:
    """GemmaRMSNorm: scales by 1 + weight, and the output has the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if is_torchs(x) or self.weight.dtype not in (x.dtype, torch.float32):
            return super().forward(x)
        return rms_norm(x, self.weight.shape, self.weight, self.eps, zero_centered=True)


class SelfOutput:
    """BertSelfOutput, BertOutput: LayerNorm(input_tensor + dropout(dense(hidden_states)))."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if is_theirs(input_tensor):
            return super().forward(hidden_states, input_tensor)
        branch = product(self.dense, hidden_states)
        return norm_of_sum(branch, input_tensor, self.LayerNorm, self.dropout)


class Intermediate:
    """BertIntermediate: activation(dense(hidden_states))."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(hidden_states)
        return activated(self.dense, self.intermediate_act_fn, hidden_states)


class GatedMLP:
    """LlamaMLP."""

    def forward(self, x: Tensor) -> Tensor:
        if is_theirs(x):
            return super().forward(x)
        gate, up = product(self.gate_proj, x), product(self.up_proj, x)
        return product(self.down_proj, _gated(self.act_fn, gate, up))


class StackedGatedMLP:
    """Phi3MLP: gate and up in one product."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(hidden_states)
        gate, up = product(self.gate_up_proj, hidden_states).chunk(2, dim=-1)
        return product(self.down_proj, _gated(self.activation_fn, gate, up))


class ModernBertMLP:
    """ModernBertMLP: calls what is activated input, and the other half gate."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(hidden_states)
        gate, up = product(self.Wi, hidden_states).chunk(2, dim=-1)
        return product(self.Wo, self.drop(_gated(self.act, gate, up)))


class T5GatedMLP:
    """T5DenseGatedActDense; wo may be kept in float32 in a narrower model."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if is_theirs(hidden_states):
            return super().forward(hidden_states)
        gate, up = product(self.wi_0, hidden_states), product(self.wi_1, hidden_states)
        x = self.dropout(_gated(self.act, gate, up))
        if x.dtype != self.wo.weight.dtype and self.wo.weight.dtype != torch.int8:
            x = x.to(self.wo.weight.dtype)
        return product(self.wo, x)
