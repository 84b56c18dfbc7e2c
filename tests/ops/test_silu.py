import pytest
import torch
import torch.nn.functional as F
from activation_cases import ActivationTests
from op_cases import device_of, skip_unsupported

import slimkernels as sk
from slimkernels.ops._activation import activation_reference


class TestSiLU(ActivationTests):
    op = "silu"

    @staticmethod
    def eager(z):
        return F.silu(z)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_negative_tail_keeps_its_relative_accuracy(backend):
    z = torch.linspace(-80, 0, 4001, device=device_of(backend))[:-1]
    bias = torch.zeros_like(z)
    skip_unsupported("silu", backend, z, bias=bias)
    truth = activation_reference(z.double(), None, "silu")
    error = ((sk.silu(z, bias=bias, backend=backend) - truth) / truth).abs().max().item()
    assert error < 4 * torch.finfo(torch.float32).eps


def test_small_inputs_are_left_to_aten(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.silu")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 100)
    x, bias = torch.randn(9, 11), torch.randn(11)
    assert torch.equal(sk.silu(x, bias=bias), F.silu(x + bias))
    with pytest.raises(sk.BackendError, match="faster below 100 elements, and the output has 99"):
        sk.silu(x, bias=bias, backend="cpu")
    text = sk.explain(sk.silu, torch.randn(10, 11), bias=bias)
    assert text.startswith("silu runs on cpu")
