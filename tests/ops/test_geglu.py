import pytest
import torch
import torch.nn.functional as F
from gated_cases import GatedTests

import slimkernels as sk


class TestGEGLU(GatedTests):
    op = "geglu"

    @pytest.fixture(params=["none", "tanh"])
    def variant(self, request):
        return {"approximate": request.param}

    @staticmethod
    def eager(gate, up, approximate):
        return F.gelu(gate, approximate=approximate) * up


def test_an_unknown_approximation_is_one_sentence():
    with pytest.raises(ValueError, match="^geglu: approximate must be 'none' or 'tanh'; got 'erf'"):
        sk.geglu(torch.randn(4, 8), approximate="erf")
