import pytest
import torch
import torch.nn.functional as F
from activation_cases import ActivationTests
from op_cases import KERNEL_BACKENDS, device_of, skip_unsupported

import slimkernels as sk
from slimkernels.ops._activation import activation_reference

APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}


class TestGELU(ActivationTests):
    op = "gelu"

    @pytest.fixture(params=APPROXIMATIONS)
    def variant(self, request):
        return {"approximate": request.param}

    @staticmethod
    def eager(z, approximate):
        return F.gelu(z, approximate=approximate)


@pytest.mark.parametrize("approximate, curve", APPROXIMATIONS.items())
@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
def test_negative_tail_keeps_its_relative_accuracy(backend, approximate, curve):
    device = device_of(backend)
    for low in range(-9, 0):
        z = torch.linspace(low, low + 1, 301, device=device)
        bias = torch.zeros_like(z)
        skip_unsupported("gelu", backend, z, bias=bias, approximate=approximate)
        y = sk.gelu(z, bias=bias, approximate=approximate, backend=backend)
        truth = activation_reference(z.double(), None, curve)
        # The exponent, about z^2 / 2 or z^3 / 14, is rounded in float32: no kernel can do better.
        exponent = truth.div(z).log().abs() + 8
        error = (y - truth).abs() / truth.abs().clamp(min=1e-300) / exponent
        assert error[z < 0].max() < torch.finfo(torch.float32).eps * 2, (low, error.max())


def test_exact_tail_on_the_cpu_is_right_to_a_few_units_in_the_last_place(each_isa):
    """What csrc/cpu/elementary.h promises of normal(): the rounding of z^2 is put back."""
    z = torch.linspace(-12, 0, 36001)[:-1]
    truth = activation_reference(z.double(), None, "gelu")
    for isa in each_isa():
        y = sk.gelu(z, bias=torch.zeros_like(z), backend="cpu")
        error = ((y - truth) / truth).abs().max().item()
        assert error < 4 * torch.finfo(torch.float32).eps, isa


@pytest.mark.parametrize("backend", [None, *KERNEL_BACKENDS, "torch"])
@pytest.mark.parametrize("wrong", ["erf", None, ["tanh"]], ids=str)
def test_an_unknown_approximation_is_one_sentence(backend, wrong):
    with pytest.raises(ValueError, match="^gelu: approximate must be 'none' or 'tanh'; got "):
        sk.gelu(torch.randn(4, 8), approximate=wrong, backend=backend)
