import pytest
import torch
import torch.nn.functional as F
from gated_cases import GatedTests

import slimkernels as sk


class TestSwiGLU(GatedTests):
    op = "swiglu"

    @staticmethod
    def eager(gate, up):
        return F.silu(gate) * up


def test_small_outputs_are_left_to_aten(monkeypatch):
    cpu = pytest.importorskip("slimkernels.backends.cpu.swiglu")
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 100)
    x = torch.randn(9, 22, dtype=torch.bfloat16)
    gate, up = x.chunk(2, -1)
    for y in (sk.swiglu(x), sk.swiglu(up, gate=gate)):
        assert torch.equal(y, F.silu(gate) * up)
    with pytest.raises(sk.BackendError, match="faster below 100 elements, and the output has 99"):
        sk.swiglu(x, backend="cpu")
    assert sk.explain(sk.swiglu, torch.randn(10, 22)).startswith("swiglu runs on cpu")
