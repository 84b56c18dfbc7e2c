"""Where a run computes, and in which precision."""

import pytest
import torch

from slimkernels.training.device import resolve_device, resolve_precision


def test_the_cpu():
    assert resolve_device("cpu") == torch.device("cpu")


def test_auto_is_a_gpu_where_there_is_one():
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["meta", "xla", "mps", "quantum", "", "cuda:-1", "cuda:99"])
def test_another_device_is_one_sentence(name):
    with pytest.raises(ValueError, match=f"the device '{name}' cannot be used: ") as raised:
        resolve_device(name)
    assert "\n" not in str(raised.value)


def test_precisions():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision("auto", cpu) == torch.float32
    assert resolve_precision("auto", cuda) == torch.bfloat16
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
