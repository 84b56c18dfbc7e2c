import pytest

from slimkernels.ops.log_softmax import LOG_SOFTMAX
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


@pytest.fixture(autouse=True)
def softmax_of_any_size(monkeypatch):
    """The cpu backend leaves small calls to ATen; its kernels are right at every size."""
    for op in (SOFTMAX, LOG_SOFTMAX):
        module = op.modules["cpu"]
        for name in () if isinstance(module, str) else vars(module):
            if name.startswith("MIN_"):
                monkeypatch.setattr(module, name, 0)
