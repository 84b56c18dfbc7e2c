import pytest

from slimkernels.ops.softmax import SOFTMAX


@pytest.fixture
def cut(request, monkeypatch):
    """ "whole": Triton's rows of softmax in registers; "blocks": the loop that long rows take."""
    module = SOFTMAX.modules["triton"]
    if request.param == "blocks" and not isinstance(module, str):
        kernels = module._softmax
        monkeypatch.setattr(kernels, "MAX_TILE", 4)
        monkeypatch.setattr(kernels, "BLOCK", 32)
    return request.param
